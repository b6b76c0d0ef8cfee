"""Networks."""

from .digits import DigitNet as DigitNet
from .efficientnet import EfficientNet as EfficientNet
from .efficientnet import efficientnet_lite0 as efficientnet_lite0
from .efficientnet import efficientnet_lite1 as efficientnet_lite1
from .efficientnet import efficientnet_lite2 as efficientnet_lite2
from .efficientnet import efficientnet_lite3 as efficientnet_lite3
from .efficientnet import efficientnet_lite4 as efficientnet_lite4
from .resnet import ResNet as ResNet
from .resnet import resnet18 as resnet18
from .resnet import resnet34 as resnet34
from .resnet import resnet50 as resnet50
from .resnet import tiny as tiny
from .vit import ViT as ViT
from .vit import convit_s as convit_s
from .vit import convit_ti as convit_ti
from .vit import cordonnier as cordonnier
from .vit import vit_b as vit_b
from .vit import vit_s as vit_s
from .vit import vit_small32 as vit_small32
from .vit import vit_ti as vit_ti
from .vit import vit_tiny8 as vit_tiny8
from .volume import VolumeNet as VolumeNet
from .volume import volume_small as volume_small
