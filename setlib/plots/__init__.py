"""What is drawn: boards of pictures (`board`), charts with axes and tables (`charts`), the premise (`evidence`)."""

from setlib.plots.board import *  # noqa: F403
from setlib.plots.charts import *  # noqa: F403
from setlib.plots.evidence import *  # noqa: F403
