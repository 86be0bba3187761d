"""A guess is what the slider says, or what a notebook's parameter gives."""

from __future__ import annotations

from setlib.explorer.guess import Guess
from setlib.files import STATIC


def test_guess_is_given_or_fifty_and_stays_on_the_scale():
    assert Guess("?", "style", {}).value == 50
    assert Guess("?", "style", {"style": 20, "other": 70}).value == 20
    assert Guess("?", "style", {"style": -30}).value == 0 and Guess("?", "style", {"style": -30}, -100).value == -30


def test_headless_a_guess_is_a_sentence(monkeypatch):
    shown = []
    monkeypatch.setattr("setlib.explorer.guess.display", lambda one: shown.append(one))
    monkeypatch.setenv(STATIC, "1")
    Guess("How much?", "style", {"style": 20})._ipython_display_()
    assert shown[0].data == "How much? **Guess: 20 %**"
    monkeypatch.setenv(STATIC, "")
    guess = Guess("How much?", "style", {})
    guess._ipython_display_()
    guess.slider.value = 70
    assert shown[1].children[1] is guess.slider and guess.value == 70
