"""Signal's pictures: what SIM selects, where LAM samples, what GAM tells apart, what class tokens attend to."""

from signal_reid.methods.pictures import by_name
from signal_reid.methods.signal.pictures.attention import Attention
from signal_reid.methods.signal.pictures.offsets import Offsets
from signal_reid.methods.signal.pictures.tokens import Tokens
from signal_reid.methods.signal.pictures.volumes import VolumesPicture

PICTURES = by_name(Tokens(), Offsets(), VolumesPicture(), Attention())
"""By the name that `signal-reid show` takes."""
