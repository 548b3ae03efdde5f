"""What a model makes of given images (Ho et al. 2020, arXiv 2006.11239, sections 4.3 and 4.4).

`bits_per_dim` is the variational bound of their code length, term by term; `progressive` the same as a code
that is sent from coarse to fine; `interpolate` meets two images half-way down the noise.
"""

from .bits import BitsPerDim, Progressive, bits_per_dim, progressive
from .interpolation import interpolate

__all__ = ["BitsPerDim", "Progressive", "bits_per_dim", "interpolate", "progressive"]
