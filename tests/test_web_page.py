"""The page in the browser: its networks in Python's ONNX Runtime, and all of it in a real browser."""

import json
import re
import shutil
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
import onnx
import onnxruntime as ort

import fetch_runtime
import fxfeedback
import make_models
import page_networks
import serve
from fxfeedback.prototypes.moments import Moments
from multi_mnist import TASKS
from steer_by_words import HELD_OUT, SEEN, WORDS, letters, sentences

LEFT, RIGHT = range(2)
LOADED = 60_000  # ms, at most, until the networks are there


@pytest.fixture(scope="module")
def networks():
    return page_networks.Networks()


@pytest.fixture(scope="module")
def address():
    """Of the page, on this machine."""
    server = serve.server(0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


# -- without a browser ------------------------------------------------------------------------------------------------


def test_the_shipped_networks_do_what_the_page_says(networks):
    measured = networks.measured()
    for name, said in networks.page["measured"].items():
        assert measured[name] == pytest.approx(said, abs=0.005), name  # one image, on the border of two classes
    assert measured["steering"]["steered"] > measured["steering"]["unsteered"] + 0.25
    assert min(measured["instructed"].values()) > 0.9
    assert measured["untaught"]["left"] > 0.9 and measured["untaught"]["right"] < 0.2


def test_the_active_units_are_the_shipped_networks_gates(networks):
    model = onnx.load(page_networks.DATA / "instructed.onnx")
    for site in networks.page["instructed"]["sites"]:
        [gate] = [node.output[0] for node in model.graph.node if node.name == f"gate/{site['name']}"]
        part = onnx.utils.Extractor(model).extract_model(["input", "instruction"], [gate])
        session = ort.InferenceSession(part.SerializeToString(), providers=["CPUExecutionProvider"])
        for number, task in enumerate(TASKS):
            given = {"input": networks.composed[:1], "instruction": page_networks.instruction(number)}
            [on] = session.run(None, given)
            assert list(on.shape[1:]) == site["shape"]
            assert "".join(str(int(unit)) for unit in on.ravel()) == site[task]


def test_words_are_read_in_the_browser_as_by_the_prior(networks):
    mini_racer = pytest.importorskip("py_mini_racer")
    script = (page_networks.DATA.parent / "js/words.js").read_text().replace("export ", "")
    words = json.loads((page_networks.DATA / "words.json").read_text())
    texts = sentences(SEEN)
    about = networks.page["steering"]
    table = torch.tensor(about["prototypes"], dtype=torch.float64)
    own = fxfeedback.Prototypes({k: Moments(1, {"head": row}, {"head": 0 * row}) for k, row in enumerate(table)})
    encoder = letters([text for several in texts.values() for text in several])
    prior = fxfeedback.TextPrior.fit({k: encoder(several).toarray() for k, several in texts.items()}, own)
    with mini_racer.MiniRacer() as engine:
        engine.eval(script)
        for text in ("Find the  seven", "a photo of the number 3", "0", "look for the eight or nine", "qq"):
            read = json.loads(engine.eval(f"JSON.stringify(readWords({json.dumps(text)}, {json.dumps(words)}))"))
            expected = prior.activation(text, encoder)[0]
            torch.testing.assert_close(torch.tensor(read["activation"]).double(), expected, rtol=0, atol=0.02)
            assert read["known"] == (text != "qq")
    named = [prior.activation(several[0], encoder)[0] for several in sentences(HELD_OUT).values()]
    right = [nn.functional.cosine_similarity(made, row, dim=0) > 0.9 for made, row in zip(named, table, strict=True)]
    assert all(right)


def test_the_shipped_learner_learns(networks):
    taught = networks.learner(RIGHT, networks.taught(30))
    assert networks.read(taught, RIGHT).mean() > networks.page["measured"]["untaught"]["right"] + 0.2


@pytest.mark.long
def test_the_first_pair_is_one_that_teaching_mends(networks):
    left, right = networks.page["pair"]
    assert right == left + len(networks.labels) and len(set(networks.labels[left])) == 2
    assert make_models.first_pair(networks) == [left, right]
    assert networks.learner(RIGHT, networks.weights)[left].argmax() != networks.labels[left][RIGHT]
    assert networks.learner(RIGHT, networks.taught(make_models.LESSON))[left].argmax() == networks.labels[left][RIGHT]


@pytest.mark.long
def test_one_script_puts_everything_together(tmp_path, monkeypatch):
    """With the shipped networks in the place of those that it trains."""
    shipped = json.loads((page_networks.DATA / "page.json").read_text())

    def files(names, about=None):
        def copied(*given):
            for name in names:
                shutil.copy(page_networks.DATA / name, given[-1] / name)
            return about

        return copied

    monkeypatch.setattr(make_models, "steered_network", files(["steering.onnx"], shipped["steering"]))
    monkeypatch.setattr(make_models, "instructed_network", files(["instructed.onnx"], shipped["instructed"]))
    learner = ["learner_step.onnx", "learner_predict.onnx", "weights.safetensors"]
    monkeypatch.setattr(make_models, "learner", files(learner))
    assert make_models.main(["--out", str(tmp_path)]) == 0
    names = sorted(path.name for path in page_networks.DATA.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    for name in names:
        if name not in ("page.json", "words.json"):
            assert (tmp_path / name).read_bytes() == (page_networks.DATA / name).read_bytes(), name
    page = json.loads((tmp_path / "page.json").read_text())
    assert page.keys() == shipped.keys() and page["pair"] == shipped["pair"]


@pytest.mark.long  # its parts: test_steer_composites.py, test_train_multi_mnist.py, test_learn_on_device.py
def test_everything_is_made_by_one_script(tmp_path, monkeypatch):
    tiny = ["--train-size=64", "--test-size=20", "--batch-size=32"]
    monkeypatch.setattr(make_models, "STEERED", ["--device=cpu", "--steps=2", "--batch-size=16"])
    monkeypatch.setattr(make_models, "INSTRUCTED", ["--device=cpu", "--epochs=1", *tiny])
    monkeypatch.setattr(make_models, "LEARNER", ["--first-steps=2", *tiny])
    assert make_models.main(["--out", str(tmp_path)]) == 0
    shipped = {path.name for path in page_networks.DATA.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == shipped
    for name in ("test_digits.bin", "lesson_digits.bin"):
        assert (tmp_path / name).read_bytes() == (page_networks.DATA / name).read_bytes()
    for path in page_networks.DATA.glob("*.onnx"):
        old, new = (ort.InferenceSession(folder / path.name) for folder in (page_networks.DATA, tmp_path))
        for takes in ("get_inputs", "get_outputs"):
            assert [x.name for x in getattr(old, takes)()] == [x.name for x in getattr(new, takes)()]


def test_the_runtime_is_the_one_that_the_script_fetches(monkeypatch, capsys):
    api, _ = (fetch_runtime.RUNTIME / name for name in fetch_runtime.FILES)
    assert f"ONNX Runtime Web v{fetch_runtime.VERSION}" in api.read_text()[:200]
    monkeypatch.setenv("npm_config_registry", fetch_runtime.RUNTIME.as_uri())
    assert fetch_runtime.main() == 1 and "error: cannot fetch file:" in capsys.readouterr().err


def test_a_package_that_is_another_is_not_taken(tmp_path, monkeypatch, capsys):
    package = tmp_path / "onnxruntime-web" / "-" / f"onnxruntime-web-{fetch_runtime.VERSION}.tgz"
    package.parent.mkdir(parents=True)
    package.write_bytes(b"another")
    monkeypatch.setenv("npm_config_registry", tmp_path.as_uri() + "/")
    monkeypatch.setattr(fetch_runtime, "RUNTIME", tmp_path / "runtime")
    assert fetch_runtime.main() == 1 and "is not the package that this script knows" in capsys.readouterr().err
    assert not (tmp_path / "runtime").exists()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("", "text/html; charset=utf-8"),
        ("js/main.js", "text/javascript; charset=utf-8"),
        ("runtime/ort.wasm.bundle.min.mjs", "text/javascript; charset=utf-8"),
        ("runtime/ort-wasm-simd-threaded.wasm", "application/wasm"),
        ("data/page.json", "application/json"),
    ],
)
def test_files_are_served_as_what_they_are(address, path, kind):
    request = urllib.request.Request(address + path, method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert answer.headers["Content-Type"] == kind


def test_a_port_that_is_taken(address, monkeypatch, capsys):
    port = address.rstrip("/").rpartition(":")[2]
    monkeypatch.setattr("sys.argv", ["serve.py", "--port", port])
    assert serve.main() == 1 and f"cannot serve at port {port}" in capsys.readouterr().err


def test_what_is_not_there_is_not_served(address):
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(address + "../serve_nothing.py", timeout=10)


# -- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium: one that is installed, or Playwright's own."""
    reason = "no Playwright: `make browser` installs it"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "microsoft-edge")
    installed = next(filter(None, map(shutil.which, names)), None)
    with api.sync_playwright() as playwright:
        if installed is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("no Chromium: `make browser` installs one where the machine lets it")
        try:
            chromium = playwright.chromium.launch(executable_path=installed)
        except api.Error as error:
            pytest.skip(f"Chromium does not start on this machine: {str(error).splitlines()[0]}")
        yield chromium
        chromium.close()


@pytest.fixture
def opened(browser, address):
    """Opens the page; in the end nothing may have gone wrong there, and no request may have left the machine."""
    troubles, contexts = [], []

    def watch(route):
        if route.request.url.startswith(address):
            route.continue_()
        else:
            troubles.append(f"a request to {route.request.url}")
            route.abort()

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        contexts.append(context)
        context.route("**/*", watch)
        page = context.new_page()
        page.on("console", lambda said: troubles.append(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("requestfailed", lambda request: troubles.append(f"no answer for {request.url}"))
        page.goto(address)
        page.get_by_role("heading", name="Two digits").wait_for(timeout=LOADED)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not troubles


def says(page, section: str, pattern: str, timeout: int = 10_000) -> re.Match:
    """What a demonstration says, once it matches the pattern."""
    from playwright.sync_api import expect

    line = page.locator(f"#{section} [role=status]")
    expect(line).to_have_text(re.compile(pattern), timeout=timeout)
    return re.search(pattern, line.inner_text().replace("\u00a0", " "))


def radio(page, group: str, choice: str):
    return page.get_by_role("group", name=group, exact=True).get_by_role("radio", name=choice, exact=True)


def first_pair(networks) -> list[str]:
    return [str(label) for label in networks.labels[networks.page["pair"][0]]]


def test_steering_changes_the_winner(opened, networks):
    page, pair = opened(), first_pair(networks)
    unsteered = says(page, "steer", r"Pass 1 sees a (\d).*Pass 2 sees a (\d)")
    assert unsteered[1] in pair and unsteered[2] in pair

    def sure_of(label: str) -> int:
        """In %, of the second pass."""
        row = page.locator("#passes").get_by_role("row", name=re.compile(f"^{label} in the image"))
        return int(row.get_by_role("cell").last.inner_text().rstrip("\u00a0%"))

    sure = {}
    for looked_for in pair:
        radio(page, "Look for", looked_for).check()
        steered = says(page, "steer", rf"Pass 1 sees a (\d).* looking for a {looked_for}, sees a (\d)")
        assert (steered[1], steered[2]) == (unsteered[1], looked_for)
        sure[looked_for] = [sure_of(label) for label in pair]
    assert sure[pair[0]][0] > sure[pair[1]][0] and sure[pair[0]][1] < sure[pair[1]][1]
    page.get_by_label("How strongly").fill("5")
    says(page, "steer", rf"looking for a {pair[1]}, sees a {pair[1]} \((?!{sure[pair[1]][1]}.%)")


def test_words_steer(opened, networks):
    page, pair = opened(), first_pair(networks)
    for label in pair:
        page.get_by_label("or say it").fill(f"look for the {WORDS[int(label)]}")
        assert says(page, "steer", rf"Pass 2, looking for “look for the {WORDS[int(label)]}”, sees a (\d)")[1] == label
    page.get_by_label("or say it").fill("qq")
    says(page, "steer", r"Pass 2, which knows none of these letters, sees a (\d)")
    page.get_by_label("or say it").fill("")
    says(page, "steer", r"Pass 2 sees a (\d)")


def test_the_instruction_changes_the_digit_read(opened, networks):
    page, pair = opened(), first_pair(networks)
    maps = page.locator("#sites").get_by_role("img")
    for task, label in zip(TASKS, pair, strict=True):
        radio(page, "Read the digit on the", task).check()
        assert says(page, "instruct", rf"read on the {task}, it reads a (\d)")[1] == label
        for site, units in zip(networks.page["instructed"]["sites"], maps.all(), strict=True):
            alone = sum(here > there for here, there in zip(site[task], site[other(task)], strict=True))
            told = f"{site['name']}: {site[task].count('1')} of {len(site[task])} units are on, {alone} of them"
            assert units.get_attribute("aria-label").startswith(told)
    radio(page, "Right digit", "4").check()
    assert (
        says(page, "instruct", r"read on the right, it reads a (\d)") and radio(page, "Right digit", "4").is_checked()
    )


def other(task: str) -> str:
    return TASKS[1 - TASKS.index(task)]


def test_it_learns_in_the_tab(opened, networks):
    from playwright.sync_api import expect

    page, reads = opened(), r"After {} steps it reads (\d+).% of right and (\d+).% of left"
    start = says(page, "teach", reads.format(0))
    untaught = networks.page["measured"]["untaught"]
    assert [int(start[2]), int(start[1])] == [round(100 * untaught[task]) for task in TASKS]

    teach, stock = page.get_by_role("button", name="Teach"), page.get_by_label("Labelled examples")
    stock.select_option("only my own")
    assert teach.is_disabled()
    page.get_by_role("button", name="Add as an example").click()
    assert teach.is_enabled() and page.locator("#examples li").all_inner_texts() == first_pair(networks)[1:]
    stock.select_option("1000 from the page")

    of_mine = page.locator("#own-says")
    mended = re.compile(rf"it now says {first_pair(networks)[RIGHT]}\b")
    expect(of_mine).to_contain_text("it now says")
    expect(of_mine).not_to_contain_text(mended)
    teach.click()
    taught = says(page, "teach", reads.format(30), timeout=60_000)
    expect(of_mine).to_contain_text(mended, timeout=60_000)
    page.get_by_role("button", name="Pause").click()
    assert int(taught[1]) >= int(start[1]) + 20
    page.get_by_text("The curve as a table").click()
    rows = page.locator("#curve-table tbody tr")
    steps, _, right = rows.nth(3).inner_text().replace("\u00a0%", "").split("\t")
    assert steps == "30" and float(right) == pytest.approx(int(taught[1]), abs=0.5)

    again = page.get_by_role("button", name="Start over")
    again.click()
    assert says(page, "teach", reads.format(0))[0] == start[0] and rows.count() == 1


def test_a_drawn_digit_is_read(opened):
    page = opened()
    page.get_by_role("button", name="Clear the right digit").click()
    box = page.get_by_role("img", name="Right digit: empty").bounding_box()
    for number, (x, y) in enumerate([(0.2, 0.2), (0.8, 0.2), (0.4, 0.9)]):  # a seven
        page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=5)
        if number == 0:
            page.mouse.down()
    page.mouse.up()
    assert page.get_by_role("img", name="Right digit: drawn by hand").is_visible()
    radio(page, "Read the digit on the", "right").check()
    assert says(page, "instruct", r"on the right, it reads a (\d)")[1] == "7"


def test_an_empty_digit_is_refused_and_not_read(opened, networks):
    page, (left, right) = opened(), first_pair(networks)
    radio(page, "Look for", right).check()
    says(page, "steer", "Pass 1 sees a")
    own, add = page.locator("#own-says"), page.get_by_role("button", name="Add as an example")
    for side in ("right", "left"):
        page.get_by_role("button", name=f"Clear the {side} digit").click()
        absent = "^The digit on the right is empty" if side == "right" else "^Both digits are empty"
        for section in ("steer", "instruct"):
            says(page, section, absent)
            assert not re.search(r"\d.%", "".join(page.locator(f"#{section} tbody").all_inner_texts()))
        assert re.search(absent, own.inner_text()) and add.is_disabled()
    for side, label in (("Left", left), ("Right", right)):
        radio(page, f"{side} digit", label).check()
    says(page, "steer", f"looking for a {right}, sees a {right}")
    says(page, "instruct", f"it reads a {left}")
    assert add.is_enabled()


@pytest.mark.parametrize("width", [1200, 360])
def test_nothing_changes_width_when_it_is_chosen(opened, width):
    page = opened(viewport={"width": width, "height": 900})
    measured = """() => [...document.querySelectorAll("main *")]
        .filter(e => !e.closest("svg, .track, .why, .unseen, option, details *"))
        .filter(e => getComputedStyle(e).display !== "inline")
        .map(e => [`${e.tagName} ${e.id} ${e.className}`, e.getBoundingClientRect().width])"""
    before = page.evaluate(measured)
    for control in [*page.get_by_role("radio").all(), page.get_by_role("button", name="Clear the left digit")]:
        control.click()
        page.wait_for_timeout(20)  # until the networks have run
        now = page.evaluate(measured)
        changed = [(*old, new) for old, (_, new) in zip(before, now, strict=True) if abs(old[1] - new) > 0.1]
        assert not changed, changed


def test_a_grey_control_says_why(opened, networks):
    from playwright.sync_api import expect

    page, (_, right) = opened(), first_pair(networks)

    def says_why(control, why: str):
        expect(control).to_have_js_property("disabled", True)
        expect(control).to_have_accessible_description(re.compile(why))
        expect(page.locator(f"#{control.get_attribute('aria-describedby')}")).to_be_visible()

    def can_be_used(control):
        expect(control).to_have_js_property("disabled", False)
        expect(control).to_have_accessible_description("")

    strength, target = page.get_by_label("How strongly"), page.get_by_role("group", name="Look for")
    says_why(strength, "something to look for")
    radio(page, "Look for", right).check()
    can_be_used(strength)
    page.get_by_label("or say it").fill("seven")
    says_why(target, "Your words go before")
    page.get_by_label("or say it").fill("")
    can_be_used(target)

    page.get_by_label("Labelled examples").select_option("only my own")
    says_why(page.get_by_role("button", name="Teach"), "no example yet")
    page.get_by_role("button", name="Clear the right digit").click()
    says_why(page.get_by_role("button", name="Add as an example"), "on the right is empty")
    says_why(page.get_by_role("button", name="Another, as right digit"), "was picked")
    radio(page, "Right digit", right).check()
    page.get_by_role("button", name="Add as an example").click()
    page.get_by_role("button", name="Teach").click()
    says_why(page.get_by_role("button", name="Start over"), "Pause it")
    page.get_by_role("button", name="Pause").click()
    can_be_used(page.get_by_role("button", name="Start over"))
    assert page.locator(":disabled:not([aria-describedby]):not(fieldset:disabled *)").count() == 0


def test_right_is_a_side_only(opened):
    page = opened()
    assert not re.findall(r"(?:reads?|gets?|%)\s+right\b", page.locator("main").inner_text())
    assert re.match(r"read correctly, of \d+ test pairs", page.locator(".curve figcaption").inner_text())
    assert page.locator("#instruct-measured").inner_text().endswith("% of the digits on the right correctly.")


def test_the_keyboard_is_enough(opened, networks):
    page, (left, right) = opened(), first_pair(networks)

    def tab_to(target):
        for _ in range(40):
            page.keyboard.press("Tab")
            if target.evaluate("element => element === document.activeElement"):
                frame = target.evaluate(
                    "element => getComputedStyle(element.closest('.choice') ?? element).outlineStyle"
                )
                assert frame != "none", "focus is not to be seen"
                return
        raise AssertionError(f"Tab does not lead to {target}")

    tab_to(page.get_by_role("link", name="Skip to the networks"))
    tab_to(radio(page, "Left digit", left))
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("img", name=f"Left digit: a {(int(left) - 1) % 10}, picked").is_visible()
    page.keyboard.press("ArrowRight")
    tab_to(page.get_by_role("button", name=f"Another {left}, as left digit"))
    tab_to(radio(page, "Look for", "nothing"))
    for _ in range(int(right) + 1):
        page.keyboard.press("ArrowRight")
    says(page, "steer", f"looking for a {right}, sees a")
    strength = page.get_by_label("How strongly")
    tab_to(strength)
    before = float(strength.input_value())
    page.keyboard.press("ArrowRight")
    assert float(strength.input_value()) == before + 0.5
    tab_to(radio(page, "Read the digit on the", "left"))
    page.keyboard.press("ArrowRight")
    says(page, "instruct", "Told to read on the right")
    tab_to(page.get_by_label("Labelled examples"))
    tab_to(page.get_by_role("checkbox", name="Mix in left digits"))
    page.keyboard.press("Space")
    tab_to(page.get_by_role("button", name="Teach"))
    page.keyboard.press("Enter")
    says(page, "teach", "After 10 steps", timeout=30_000)
    page.keyboard.press("Enter")
    assert page.get_by_role("button", name="Teach").is_visible()


def test_a_phone_can_show_it_and_everything_has_a_name(opened):
    page = opened(viewport={"width": 360, "height": 740}, has_touch=True, color_scheme="dark", reduced_motion="reduce")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for control in page.locator("button, select, .choice, input[type=range]").all():
        box = control.bounding_box()
        assert min(box["width"], box["height"]) >= 16 and box["x"] >= 0 and box["x"] + box["width"] <= 360
    small = "() => [...document.querySelectorAll('main *')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 12)"
    assert page.evaluate(f"({small})().map(e => e.className).filter(name => name !== 'mark')") == []

    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    named = {"button", "checkbox", "combobox", "image", "radio", "slider", "table"}
    nodes = [node for node in tree if not node["ignored"] and node["role"]["value"] in named]
    assert len(nodes) > 40
    assert [json.dumps(node) for node in nodes if not node["name"]["value"].strip()] == []
