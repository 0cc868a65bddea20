"""The report in a real browser: it draws, filters, sorts, shows numbers, and runs nothing that a model wrote."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMIUM, chromium
from report_runs import CONFIG, rollout, write_lines

from rlkd.reporting.report_page import write_report

pytestmark = [
    pytest.mark.browser,
    pytest.mark.process,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium; on Debian: apt-get install chromium"),
]
NASTY = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>"
WIDE, PHONE = (1300, 900), (390, 844)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 iterations; of each fifth, eight samples. One reward failed, and a teacher wrote a part of one completion."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG.format(name=NASTY.replace("'", ""), iterations=60))
    chance = random.Random(0)
    rows = [
        {"iteration": i, "reward/mean": i / 60 + 0.1 * chance.random(), "loss": 1 / i, "lr": 1e-6, NASTY: float(i)}
        | ({"eval/greedy": i / 60} if i % 10 == 0 else {})
        for i in range(1, 61)
    ]
    write_lines(folder / "metrics.jsonl", rows)
    for at in range(5, 61, 5):
        lines = [rollout(at, n, [NASTY, *"abcdefgh", " End"], row=n) for n in range(8)]
        lines[2] |= {"reward": None, "error": f"ValueError: {NASTY}"} if at == 30 else {}
        lines[3] |= {"segments": [["teacher", 2, 5], ["glue", 5, 6]]}
        write_lines(folder / "rollouts" / f"{at:06d}-rank0.jsonl", lines)
    trainer = folder / "tokens"
    trainer.mkdir()
    found = np.tile(np.linspace(0, 0.09, 10, dtype=np.float16), 8)  # by token, of the eight completions
    found[4] = np.nan
    np.savez(trainer / "000060-rank0.npz", gaps=-found, entropies=10 * found, lengths=np.full(8, 10))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory):
    with chromium(tmp_path_factory.mktemp("browser") / "profile") as found:
        yield found


@pytest.fixture
def tab(browser, run_dir):
    page = browser.tab()
    page.show(*WIDE)
    page.open(write_report(run_dir).as_uri())
    yield page
    assert page.said == [], "an error, or a word on the console"
    assert page.get("window.hacked === undefined")


ROWS = "[...document.querySelectorAll('#list tbody tr')]"
CELLS = ROWS + ".map((row) => [...row.cells].map((cell) => cell.textContent))"


def set_value(tab, selector: str, value: str) -> None:
    tab.get(
        f"(() => {{ const e = document.querySelector('{selector}'); e.value = '{value}'; "
        "for (const kind of ['input', 'change']) e.dispatchEvent(new Event(kind, {bubbles: true})); })()"
    )


def has(picture, colour: tuple[int, int, int], pixels: int = 20) -> bool:
    """Whether a picture has that many pixels of a colour, or one close to it."""
    return int((np.abs(np.asarray(picture, dtype=int) - colour) < 25).all(-1).sum()) >= pixels


@pytest.mark.parametrize(
    ("size", "scheme", "blue", "card"),
    [
        (WIDE, "light", (0, 114, 178), (255, 255, 255)),
        (WIDE, "dark", (86, 180, 233), (28, 32, 38)),
        (PHONE, "light", (0, 114, 178), (255, 255, 255)),
    ],
)
def test_every_region_is_drawn(browser, run_dir, size, scheme, blue, card):
    tab = browser.tab()
    tab.show(*size, scheme, phone=size == PHONE)
    tab.open(write_report(run_dir).as_uri())
    assert tab.get("document.documentElement.scrollWidth") <= size[0], "nothing sticks out of the window"
    assert tab.get("document.querySelectorAll('.plot').length") == 4
    tab.get("document.querySelectorAll('.plot').forEach((plot, i) => plot.id = `plot${i}`)")
    for plot in range(4):
        picture = tab.picture(f"#plot{plot}")
        assert has(picture, blue) and has(picture, card), f"no curve in plot {plot}"
    for region in (".tile", "#sample", "#list", ".figures"):
        picture = tab.picture(region)
        assert has(picture, card, 500) and len(picture.getcolors(1 << 24)) > 20, f"no text in {region}"
    assert tab.said == []


def test_the_first_screen_and_the_constants(tab):
    assert "16.7% → 100.0%" in tab.get("document.querySelector('.tiles').innerText")
    assert "Learning rate 1e−6" in tab.get("document.querySelector('#curves summary').innerText")
    assert tab.get("document.querySelectorAll('.plot canvas').length") == 4
    tab.point_at("#curves summary", click=True)
    tab.wait("document.querySelectorAll('.plot canvas').length === 5")
    flat = "document.querySelector('#curves details .plot')"
    low, high = tab.get(f"[{flat}.plot.scales.y.min, {flat}.plot.scales.y.max]")
    assert low < 1e-6 < high and high - low > 1e-8, "the axis does not magnify rounding"
    assert tab.get("document.title").startswith("tiny")


def test_the_pointer_on_a_curve_shows_its_value(tab):
    tab.point_at(".plot .u-over")
    tab.wait("document.querySelector('.figures thead').innerText.includes('at 3')")
    at = int(tab.get("document.querySelector('.figures thead th:last-child').innerText").removeprefix("at "))
    index = tab.get("document.querySelector('.plot').curves[0].curve.x").index(at)
    value = tab.get("document.querySelector('.plot').curves[0].curve.y")[index]
    shown = float(tab.get("document.querySelector('.figures tbody td:last-child').innerText"))
    assert shown == pytest.approx(value, rel=1e-3)


def test_samples_are_filtered(tab):
    everything = tab.get(f"{ROWS}.length")
    assert everything == 12 * 6 and tab.get("document.querySelector('#count').textContent") == "72 of 72 samples"
    set_value(tab, "#from", "0.5")
    assert {row[2] for row in tab.get(CELLS)} == {"1"} and 0 < tab.get(f"{ROWS}.length") < everything
    set_value(tab, "#from", "")
    set_value(tab, "#at", "30")
    assert {row[0] for row in tab.get(CELLS)} == {"30"}
    tab.point_at("#errors", click=True)
    assert [row[-1] for row in tab.get(CELLS)] == ["error"]
    assert "ValueError: </script>" in tab.get("document.querySelector('#sample').innerText")
    set_value(tab, "#at", "60")
    assert tab.get(CELLS) == [] and "No sample" in tab.get("document.querySelector('#sample').innerText")
    tab.point_at("#errors", click=True)
    set_value(tab, "#at", "")
    set_value(tab, "#search", "TRAIN-3")
    assert {row[1] for row in tab.get(CELLS)} == {"train-3"}
    set_value(tab, "#search", "H eND")
    assert tab.get(f"{ROWS}.length") == everything, "in the completions, in capitals or not"
    set_value(tab, "#search", "nowhere")
    assert tab.get(CELLS) == []


def test_samples_are_sorted(tab):
    heads = "document.querySelector('#list th[data-key={}] button')"
    assert [row[0] for row in tab.get(CELLS)][:1] == ["60"], "the newest first"
    for key, column in (("reward", 2), ("at", 0), ("length", 4)):
        for direction in (1, -1):
            tab.get(heads.format(key) + ".click()")
            values = [float(row[column].replace("−", "-")) for row in tab.get(CELLS) if row[column] != "—"]
            sign = -1 if tab.get(f"document.querySelector('#list th[data-key={key}]').ariaSort") == "descending" else 1
            assert values == sorted(values, key=lambda value, sign=sign: sign * value), (key, direction)
    tab.get(heads.format("reward") + ".click()")
    assert tab.get(CELLS)[-1][2] == "—", "what has no reward comes last"


def test_tokens_are_coloured_by_what_the_reader_picks(tab):
    set_value(tab, "#search", "train-3")
    set_value(tab, "#at", "55")
    options = "[...document.querySelector('#colour').options].map((option) => option.value)"
    assert tab.get(options) == ["advantage", "ratio", "surprise", "author"], "only what was recorded"
    colours = "[...document.querySelectorAll('.tokens span')].map((span) => getComputedStyle(span).backgroundColor)"
    set_value(tab, "#colour", "ratio")
    up, down = tab.get(colours)[:2]
    assert "0, 114, 178" in up and "213, 94, 0" in down, "the teacher's log-prob is higher, and lower"
    set_value(tab, "#colour", "advantage")
    given = tab.get(colours)
    assert given[2] == given[5] == "rgba(0, 0, 0, 0)" and given[0] == given[1] == given[9] != given[2]
    set_value(tab, "#colour", "author")
    by_author = tab.get(colours)
    assert len({by_author[0], by_author[2], by_author[5]}) == 3 and by_author[2] == by_author[4]
    assert "template" in tab.get("document.querySelector('.legend').innerText")


def test_what_the_trainer_found_is_shown_where_it_was_recorded(tab):
    set_value(tab, "#search", "train-0")
    set_value(tab, "#at", "60")
    options = "[...document.querySelector('#colour').options].map((option) => option.value)"
    assert tab.get(options) == ["advantage", "ratio", "entropy", "surprise", "gap", "author"]
    set_value(tab, "#colour", "gap")
    colours = tab.get("[...document.querySelectorAll('.tokens span')].map((s) => getComputedStyle(s).backgroundColor)")
    assert colours[4] == "rgba(0, 0, 0, 0)" and "213, 94, 0" in colours[9], "no value, and a lower log-prob"
    tab.point_at(".tokens span[data-t='9']")
    tab.wait("!document.querySelector('#tip').hidden")
    said = tab.get("document.querySelector('#tip').innerText")
    assert "−0.09" in said and "0.9" in said, said


def test_the_pointer_on_a_token_shows_its_numbers(tab):
    tab.point_at(".tokens span[data-t='4']")
    tab.wait("!document.querySelector('#tip').hidden")
    said = tab.get("document.querySelector('#tip').innerText")
    for part in ('"d"', "5 of 10", "−0.5", "−0.45", "0.05"):
        assert part in said, said
    tab.point_at("h1")
    tab.wait("document.querySelector('#tip').hidden")


def test_the_keyboard_moves_through_samples_tokens_and_colours(tab):
    tab.point_at("#list tbody tr", click=True)
    chosen = f"{ROWS}.findIndex((row) => row.ariaSelected === 'true')"
    tab.press("j")
    tab.press("ArrowDown")
    assert tab.get(chosen) == 2
    tab.press("k")
    assert tab.get(chosen) == 1
    tab.press("ArrowRight")
    tab.press("ArrowRight")
    assert "2 of 10" in tab.get("document.querySelector('#tip').innerText")
    before = tab.get("document.querySelector('#colour').value")
    tab.press("c")
    assert tab.get("document.querySelector('#colour').value") != before
    assert tab.get(chosen) == 1
    tab.press("/")
    tab.press("j")
    assert tab.get("document.activeElement.id + document.querySelector('#search').value") == "searchj"


def test_print_is_light(browser, run_dir):
    tab = browser.tab()
    tab.show(*WIDE, "dark")
    tab.open(write_report(run_dir).as_uri())
    assert tab.get("document.documentElement.dataset.theme") == "dark"
    tab.get("window.dispatchEvent(new Event('beforeprint'))")
    assert tab.get("document.documentElement.dataset.theme") == "light"
    assert has(tab.picture(".plot"), (0, 114, 178))
    tab.get("window.dispatchEvent(new Event('afterprint'))")
    assert tab.get("document.documentElement.dataset.theme") == "dark"
    assert len(tab.call("Page.printToPDF")["data"]) > 10_000 and tab.said == []
