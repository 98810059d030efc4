from .client import freeze as freeze
from .client import moving as moving
from .fedavg import strategy as strategy

__all__: list[str]
