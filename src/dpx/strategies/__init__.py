"""How the noise of one step is correlated with that of others: matrix factorization."""

from ._banded_inverse import BandedInverse as BandedInverse
from ._banded_toeplitz import BandedToeplitz as BandedToeplitz
from ._base import AbstractAnalysedStrategy as AbstractAnalysedStrategy, AbstractStrategy as AbstractStrategy
from ._buffered_toeplitz import BufferedToeplitz as BufferedToeplitz
from ._column_normalized import ColumnNormalizedBanded as ColumnNormalizedBanded
from ._dense import DenseStrategy as DenseStrategy
from ._error import momentum_workload as momentum_workload
from ._geometric import GeometricStrategy as GeometricStrategy
from ._identity import Identity as Identity
from ._square_root import SquareRootToeplitz as SquareRootToeplitz
from ._tree import TreeAggregation as TreeAggregation
