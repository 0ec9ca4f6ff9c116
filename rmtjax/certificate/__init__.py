r"""Certificates: rigorous bounds on how much changed kernels can change the predictions.

In come a network before and after the change, and inputs. Out come a bound on the change of each
logit, whether each prediction must stay the same, and a bound on the increase of the loss.

The network is a chain of dense layers $a_{l+1} = \phi(a_l W_l + b_l)$, the last one without
$\phi$. Its kernels change from $W_l$ to $W'_l = W_l - R_l$. Let $a_l$ be the activations before the
change. Since $\phi$ does not increase distances, the activations move by at most

$d_{l+1} = \|a_l R_l\|_2 + \|W'_l\|_2\, d_l$, with $d_1 = 0$.

The logits of the last layer change by $-a R + v$. Entry $k$ of $v$ is at most
$\|W'_{\cdot k}\|_2\, d$, and two entries differ by at most
$\|W'_{\cdot j} - W'_{\cdot k}\|_2\, d$. So the bound is exact if only the last kernel changes.
It is loose for earlier kernels: a product of operator norms assumes that every layer stretches its
inputs as much as it can.

The bounds hold for the networks in exact arithmetic, with the parameters as JAX stores them. The
rounding of the bounds is added to them. It is $(n + 8)\, \epsilon$ of the sum of magnitudes for a
sum of n products, $(n + 8)\, \epsilon$ of a norm and $2 \max(m, n)\, \epsilon$ of an operator norm.
Subnormal numbers count as zero. The rounding of a run in floating point is not included.

`output_changes` is no bound but an equality: the mean square by which the outputs of each layer
change on data, from the moments of its inputs.
"""

from rmtjax.certificate._certify import Certificate as Certificate, certify as certify
from rmtjax.certificate._data_path import (
    data_path as data_path,
    PathCertificate as PathCertificate,
)
from rmtjax.certificate._outputs import (
    output_changes as output_changes,
    OutputChange as OutputChange,
)
from rmtjax.certificate._rounding import operator_norm as operator_norm

__all__ = [
    "Certificate",
    "OutputChange",
    "PathCertificate",
    "certify",
    "data_path",
    "operator_norm",
    "output_changes",
]
