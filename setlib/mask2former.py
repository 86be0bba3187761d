"""(placeholder until the head's room is merged)"""

from setlib.heads import Mask2FormerHead, Masks  # noqa: F401
