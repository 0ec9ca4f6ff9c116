r"""What a change of kernels can change in the predictions, as bounds that hold.

A chain of dense layers $a_{l+1} = \phi(a_l W_l + b_l)$, the last without $\phi$, has kernels
changed from $W_l$ to $W'_l = W_l - R_l$. With $a_l$ the activations before the change, those
after it are off by at most

$d_{l+1} = \|a_l R_l\|_2 + \|W'_l\|_2\, d_l$, and $d_1 = 0$,

since $\phi$ is no expansion. This is the telescope that changes the layers one by one, the
last first. The last layer is followed exactly: its logits change by $-a R + v$, where the
entry $k$ of $v$ is at most $\|W'_{\cdot k}\|_2\, d$ and the difference of two entries at most
$\|W'_{\cdot j} - W'_{\cdot k}\|_2\, d$.

So the bound is exact where the last kernel alone is changed. Further up it is loose, by
a factor for each layer between: products of operator norms suppose that each layer
stretches the worst there is.

The bounds are on the networks in exact arithmetic, with the parameters as JAX holds them. The
rounding of what is computed here is bounded and added: for a sum of n products
$(n + 8)\, \epsilon$ of the sum of magnitudes, for a norm $(n + 8)\, \epsilon$ and for an
operator norm $2 \max(m, n)\, \epsilon$ of itself. Numbers below the least normal one count
as zero. A run in floating point adds rounding of its own.
"""

from rmtjax.certificate._certify import Certificate as Certificate, certify as certify
from rmtjax.certificate._rounding import operator_norm as operator_norm

__all__ = ["Certificate", "certify", "operator_norm"]
