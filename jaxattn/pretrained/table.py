"""The table of the networks with published weights: their size, their cost, and what they were measured to reach."""

from typing import NamedTuple

from jaxattn.pretrained.registry import names, published


class Figures(NamedTuple):
    """What was published of some weights, at the size of their images in the registry; None for what was not."""

    parameters: float | None  # millions
    gmacs: float | None  # billions of products and sums for an image
    top_1: float | None  # accuracy on ImageNet's 50,000 validation images, in per cent


# timm's own measurements of its weights (its results-imagenet.csv and benchmark-infer-amp-*.csv), and its authors' of
# NAT and DiNAT, by where the weights are
FIGURES = {
    "timm/resnet18.a1_in1k": Figures(11.69, 1.82, 71.5),
    "timm/resnet34.a1_in1k": Figures(21.8, 3.67, 76.4),
    "timm/resnet50.a1_in1k": Figures(25.56, 4.11, 80.4),
    "timm/tf_efficientnet_lite0.in1k": Figures(4.65, 0.4, 74.8),
    "timm/tf_efficientnet_lite1.in1k": Figures(5.42, 0.62, 76.7),
    "timm/tf_efficientnet_lite2.in1k": Figures(6.09, 0.89, 77.5),
    "timm/tf_efficientnet_lite3.in1k": Figures(8.2, 1.65, 79.8),
    "timm/tf_efficientnet_lite4.in1k": Figures(13.01, 4.04, 81.5),
    "timm/convnext_atto.d2_in1k": Figures(3.7, 0.55, 75.7),
    "timm/convnext_femto.d1_in1k": Figures(5.22, 0.79, 77.5),
    "timm/convnext_pico.d1_in1k": Figures(9.05, 1.37, 79.5),
    "timm/convnext_nano.in12k_ft_in1k": Figures(15.59, 2.46, 82.3),
    "timm/convnext_tiny.fb_in22k_ft_in1k": Figures(28.59, 4.47, 82.9),
    "timm/convnext_small.fb_in22k_ft_in1k": Figures(50.22, 8.71, 84.6),
    "timm/convnext_base.fb_in22k_ft_in1k": Figures(88.59, 15.38, 85.8),
    "timm/convnext_large.fb_in22k_ft_in1k": Figures(197.77, 34.4, 86.6),
    "timm/convnext_xlarge.fb_in22k_ft_in1k": Figures(350.2, 60.98, 87.0),
    "timm/convnextv2_atto.fcmae_ft_in1k": Figures(3.71, 0.55, 76.6),
    "timm/convnextv2_femto.fcmae_ft_in1k": Figures(5.23, 0.79, 78.5),
    "timm/convnextv2_pico.fcmae_ft_in1k": Figures(9.07, 1.37, 80.3),
    "timm/convnextv2_nano.fcmae_ft_in1k": Figures(15.62, 2.46, 81.9),
    "timm/convnextv2_tiny.fcmae_ft_in1k": Figures(28.64, 4.47, 82.9),
    "timm/convnextv2_base.fcmae_ft_in1k": Figures(88.72, 15.38, 84.9),
    "timm/convnextv2_large.fcmae_ft_in1k": Figures(197.96, 34.4, 85.8),
    "timm/convnextv2_huge.fcmae_ft_in1k": Figures(660.29, 115.0, 86.3),
    "timm/swin_tiny_patch4_window7_224.ms_in22k_ft_in1k": Figures(28.29, 4.51, 81.0),
    "timm/swin_small_patch4_window7_224.ms_in22k_ft_in1k": Figures(49.61, 8.77, 83.3),
    "timm/swin_base_patch4_window7_224.ms_in22k_ft_in1k": Figures(87.77, 15.47, 85.3),
    "timm/swin_base_patch4_window12_384.ms_in22k_ft_in1k": Figures(87.9, 47.19, 86.4),
    "timm/swin_large_patch4_window7_224.ms_in22k_ft_in1k": Figures(196.53, 34.53, 86.3),
    "timm/swin_large_patch4_window12_384.ms_in22k_ft_in1k": Figures(196.74, 104.08, 87.1),
    "timm/swinv2_tiny_window8_256.ms_in1k": Figures(28.35, 5.96, 81.8),
    "timm/swinv2_small_window8_256.ms_in1k": Figures(49.73, 11.58, 83.8),
    "timm/swinv2_base_window8_256.ms_in1k": Figures(87.92, 20.37, 84.2),
    "timm/swinv2_large_window12_192.ms_in22k": Figures(228.77, 26.17, None),
    "shi-labs/nat-mini-in1k-224": Figures(20, 2.7, 81.8),
    "shi-labs/nat-tiny-in1k-224": Figures(28, 4.3, 83.2),
    "shi-labs/nat-small-in1k-224": Figures(51, 7.8, 83.7),
    "shi-labs/nat-base-in1k-224": Figures(90, 13.7, 84.3),
    "shi-labs/dinat-mini-in1k-224": Figures(20, 2.7, 81.8),
    "shi-labs/dinat-tiny-in1k-224": Figures(28, 4.3, 82.7),
    "shi-labs/dinat-small-in1k-224": Figures(51, 7.8, 83.8),
    "shi-labs/dinat-base-in1k-224": Figures(90, 13.7, 84.4),
    "shi-labs/dinat-large-in22k-in1k-224": Figures(200, 30.6, 86.5),
    "timm/deit_tiny_patch16_224.fb_in1k": Figures(5.72, 1.26, 72.2),
    "timm/deit_small_patch16_224.fb_in1k": Figures(22.05, 4.61, 79.9),
    "timm/deit_base_patch16_224.fb_in1k": Figures(86.57, 17.58, 82.0),
    "timm/convit_tiny.fb_in1k": Figures(5.71, 1.26, 73.1),
    "timm/convit_small.fb_in1k": Figures(27.78, 5.76, 81.4),
    "timm/deit3_small_patch16_224.fb_in22k_ft_in1k": Figures(22.06, 4.61, 83.1),
    "timm/deit3_medium_patch16_224.fb_in22k_ft_in1k": Figures(38.85, 8.0, 84.5),
    "timm/deit3_base_patch16_224.fb_in22k_ft_in1k": Figures(86.59, 17.58, 85.7),
    "timm/deit3_large_patch16_224.fb_in22k_ft_in1k": Figures(304.37, 61.6, 87.0),
    "timm/deit3_huge_patch14_224.fb_in22k_ft_in1k": Figures(632.13, 167.4, 87.2),
    "timm/vit_small_patch14_dinov2.lvd142m": Figures(22.06, 46.76, None),
    "timm/vit_small_patch14_reg4_dinov2.lvd142m": Figures(22.06, 46.95, None),
    "timm/vit_base_patch14_dinov2.lvd142m": Figures(86.58, 151.71, None),
    "timm/vit_base_patch14_reg4_dinov2.lvd142m": Figures(86.58, 152.25, None),
    "timm/vit_large_patch14_dinov2.lvd142m": Figures(304.37, 507.15, None),
    "timm/vit_large_patch14_reg4_dinov2.lvd142m": Figures(304.37, 508.9, None),
    "timm/vit_base_patch32_clip_224.openai": Figures(88.22, 4.41, None),
    "timm/vit_base_patch16_clip_224.openai": Figures(86.57, 17.58, None),
    "timm/vit_large_patch14_clip_224.openai": Figures(304.2, 81.08, None),
    "timm/vit_base_patch16_siglip_224.webli": Figures(92.88, 17.73, None),
    "timm/vit_large_patch16_siglip_256.webli": Figures(315.96, 81.34, None),
    "timm/vit_so400m_patch14_siglip_224.webli": Figures(427.68, 110.26, None),
    "timm/botnet26t_256.c1_in1k": Figures(12.49, 3.32, 79.3),
    "timm/halonet26t.a1h_in1k": Figures(12.48, 3.19, 79.1),
    "timm/halonet50ts.a1h_in1k": Figures(22.73, 5.3, 81.6),
    "timm/lambda_resnet26t.c1_in1k": Figures(10.96, 3.02, 79.1),
    "timm/lambda_resnet50ts.a1h_in1k": Figures(21.54, 5.07, 81.2),
    "timm/poolformer_s12.sail_in1k": Figures(11.92, 1.82, 77.2),
    "timm/poolformer_s24.sail_in1k": Figures(21.39, 3.41, 80.3),
    "timm/poolformer_s36.sail_in1k": Figures(30.86, 5, 81.4),
    "timm/poolformer_m36.sail_in1k": Figures(56.17, 8.8, 82.1),
    "timm/poolformer_m48.sail_in1k": Figures(73.47, 11.59, 82.5),
    "timm/poolformerv2_s12.sail_in1k": Figures(11.89, 1.83, 78.0),
    "timm/poolformerv2_s24.sail_in1k": Figures(21.34, 3.42, 80.7),
    "timm/poolformerv2_s36.sail_in1k": Figures(30.79, 5.01, 81.6),
    "timm/poolformerv2_m36.sail_in1k": Figures(56.08, 8.81, 82.2),
    "timm/poolformerv2_m48.sail_in1k": Figures(73.35, 11.59, 82.6),
    "timm/convformer_s18.sail_in22k_ft_in1k": Figures(26.77, 3.96, 83.8),
    "timm/convformer_s36.sail_in22k_ft_in1k": Figures(40.01, 7.67, 85.4),
    "timm/convformer_m36.sail_in22k_ft_in1k": Figures(57.05, 12.89, 86.2),
    "timm/convformer_b36.sail_in22k_ft_in1k": Figures(99.88, 22.69, 87.0),
    "timm/caformer_s18.sail_in22k_ft_in1k": Figures(26.34, 4.13, 84.1),
    "timm/caformer_s36.sail_in22k_ft_in1k": Figures(39.3, 8, 85.8),
    "timm/caformer_m36.sail_in22k_ft_in1k": Figures(56.2, 13.29, 86.6),
    "timm/caformer_b36.sail_in22k_ft_in1k": Figures(98.75, 23.22, 87.5),
    "timm/convmixer_768_32.in1k": Figures(21.11, 19.55, 80.2),
    "timm/convmixer_1024_20_ks9_p14.in1k": Figures(24.38, 5.55, 76.9),
    "timm/convmixer_1536_20.in1k": Figures(51.63, 48.68, 81.4),
    "timm/volo_d1_224.sail_in1k": Figures(26.63, 6.94, 84.1),
    "timm/volo_d2_224.sail_in1k": Figures(58.68, 14.34, 85.2),
    "timm/volo_d3_224.sail_in1k": Figures(86.33, 20.78, 85.4),
    "timm/volo_d4_224.sail_in1k": Figures(192.96, 44.34, 85.9),
    "timm/volo_d5_224.sail_in1k": Figures(295.46, 72.4, 86.1),
    "timm/samvit_base_patch16.sa1b": Figures(89.67, 486.43, None),
    "timm/samvit_large_patch16.sa1b": Figures(308.28, 1493.86, None),
    "timm/samvit_huge_patch16.sa1b": Figures(637.03, 2982.23, None),
    "timm/maxvit_tiny_tf_224.in1k": Figures(30.92, 5.6, 83.4),
    "timm/maxvit_small_tf_224.in1k": Figures(68.93, 11.66, 84.5),
    "timm/maxvit_base_tf_224.in1k": Figures(119.47, 24.04, 84.9),
    "timm/maxvit_large_tf_224.in1k": Figures(211.79, 43.68, 84.9),
    "timm/coatnet_0_rw_224.sw_in1k": Figures(27.44, 4.43, 82.4),
    "timm/coatnet_1_rw_224.sw_in1k": Figures(41.72, 8.04, 83.6),
    "timm/coatnet_2_rw_224.sw_in12k_ft_in1k": Figures(73.87, 15.09, 86.6),
}
HEAD = """| name | parameters | GMACs | top-1 | pixels | crop | outputs | weights | licence |
|---|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    """Every network that `load` knows, as a table in Markdown, with what was published of the weights: parameters,
    products and sums for an image, accuracy on ImageNet, where they are at Hugging Face, and their licence.

    >>> print(table()[:240])
    | name | parameters | GMACs | top-1 | pixels | crop | outputs | weights | licence |
    |---|---|---|---|---|---|---|---|---|
    | `resnet18` | 11.7 M | 1.82 | 71.5 % | 224² | 0.95 | 1000 | timm/resnet18.a1_in1k | Apache-2.0 |
    ...
    """
    return HEAD + "".join(f"{_row(name)}\n" for name in names())


def _row(name: str) -> str:
    """A network's line in the table."""
    record = published(name)
    found, step = FIGURES.get(record.source, Figures(None, None, None)), record.preprocess
    cells = [
        f"`{name}`",
        "" if found.parameters is None else f"{found.parameters:.1f} M",
        "" if found.gmacs is None else f"{found.gmacs:g}",
        "" if found.top_1 is None else f"{found.top_1:.1f} %",
        f"{step.size}²",
        f"{step.crop:g}",
        str(record.num_classes or "features"),
        record.source,
        record.licence,
    ]
    return f"| {' | '.join(cells)} |"
