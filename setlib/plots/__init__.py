"""What is drawn: boards of pictures (`board.py`), charts with axes and tables (`charts.py`)."""

from setlib.plots.board import *  # noqa: F403
from setlib.plots.charts import *  # noqa: F403
