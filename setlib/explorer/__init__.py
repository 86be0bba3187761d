"""The interactive views: pure functions first, widgets over them."""
