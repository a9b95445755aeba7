"""Signal's pictures: what SIM selects, where LAM samples, what GAM tells apart, what class tokens attend to."""

from signal_reid.methods.pictures import by_name
from signal_reid.methods.signal.pictures.tokens import Tokens

PICTURES = by_name(Tokens())
"""By the name that `signal-reid show` takes."""
