"""Networks."""

from .digits import DigitNet as DigitNet
from .efficientnet import EfficientNet as EfficientNet
from .efficientnet import efficientnet_lite0 as efficientnet_lite0
from .resnet import ResNet as ResNet
from .resnet import resnet18 as resnet18
from .resnet import resnet34 as resnet34
from .resnet import resnet50 as resnet50
from .resnet import tiny as tiny
