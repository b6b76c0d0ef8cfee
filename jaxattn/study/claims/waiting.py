"""The claims whose experiments are not written yet: they train networks. The report says so."""

from jaxattn.study.claim import Claim

CLAIMS = (
    Claim(
        3, "吼吼", "The essence of attention is the similarity of query and key.", "注意力的本质是 Q 与 K 的相似度。"
    ),
    Claim(6, "吼吼", "Softmax is optional; ReLU does as well.", "softmax 不是必需的，换成 ReLU 也可以。"),
    Claim(
        10,
        "吼吼",
        "Little data favours the CNN, much data favours attention.",
        "数据少时 CNN 占优，数据多时注意力占优。",
    ),
    Claim(13, "匿名用户", "Attention is a distance metric between positions.", "注意力是位置之间的一种距离度量。"),
    Claim(
        14,
        "匿名用户",
        "Convolution is local, attention relational; convolution is degenerate attention.",
        "卷积是局部的，注意力是关系性的；卷积是退化的注意力。",
    ),
    Claim(
        20,
        "aluea",
        "Two convolution filters can do what selecting attention does (ac, bd).",
        "两个卷积核就能做到注意力的选择（ac、bd）。",
    ),
    Claim(21, "aluea", "Self-attention has the stronger inductive bias.", "自注意力的归纳偏置更强。"),
    Claim(
        22,
        "mof.ii",
        "Convolution is not local attention, yet local attention can replace it in a whole network.",
        "卷积不是局部注意力，但局部注意力可以在整个网络里替代卷积。",
    ),
)
