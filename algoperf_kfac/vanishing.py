"""Where output gradients sum to zero over positions, so that reduce's B is nothing but rounding.

Behind some layers the loss does not see what all positions have in common: a normalisation over positions takes
their mean out, and a softmax over keys a common shift. Of such a layer sum_r g = 0 for each example, and

    tr B = sum_n |sum_r g|^2    against    sum_n sum_r |g|^2

tells it: the share is about R where gradients agree, 1 where they are independent, and some eps^2 from rounding
alone. The approximation "mixed" then takes a multiple of the identity in B's place, of the trace of expand's B,
block by block and channel group by channel group.
"""

from __future__ import annotations

# Errors of such sums relative to the gradients' root mean square, in units of eps: measured were up to 600 in
# front of instance norms, while sums that do not vanish have the order of one. Coarse dtypes leave less room.
ROUNDING = 4096.0
LARGEST = 0.03


def largest_share(eps: float) -> float:
    """The largest share of tr B in the summed squares that is taken for rounding.

    Args:
        eps: of the coarsest dtype among those that inputs and output gradients came in.
    """
    return min(ROUNDING * eps, LARGEST) ** 2
