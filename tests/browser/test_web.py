"""The planner's web page in a real browser: painted before Python, and the same figures with it.

Run: pytest tests/browser/test_web.py (needs Chromium, and npm to fetch Pyodide once)
"""

from __future__ import annotations

import zlib
from base64 import b64decode
from urllib.parse import quote, urlsplit

import pytest
from web_kit import (
    ROOT,
    SETTLED,
    STARTS_WITHIN,
    SUB_PATH,
    build_web,
    first_of,
    ledger_of,
    random_fragments,
    served,
    show,
)

import rlhf_lab as lab
from rlhf_lab.stages import STAGES
from rlhf_lab.widgets.planner_link import settings_of
from rlhf_lab.widgets.planner_view import call, verdict

HOSTILE = '<img src=x onerror="window.hacked=1"><script>window.hacked=1</script>\'\\'


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """(address, folder) of the page, built now."""
    top = tmp_path_factory.mktemp("web")
    folder = top / SUB_PATH.strip("/")
    try:
        build_web.build(folder, ROOT / "build" / "cache")
    except RuntimeError as error:
        pytest.skip(str(error))
    with served(top) as address:
        yield address, folder


class Tab:
    """A page, its requests, and what went wrong on it."""

    def __init__(self, browser, **settings):
        self.context = browser.new_context(accept_downloads=True, **settings)
        self.page = self.context.new_page()
        self.asked, self.errors = [], []
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("dialog", lambda dialog: self.errors.append(dialog.message))

    def close(self, address: str) -> None:
        self.context.close()
        assert not self.errors
        strange = [url for url in self.asked if not url.startswith((address, "blob:", "data:"))]
        assert not strange


@pytest.fixture(scope="module")
def planner(site, browser):
    """One page, on which Python runs. It asks for nothing outside its own folder."""
    tab = Tab(browser, viewport={"width": 1100, "height": 900})
    tab.page.goto(site[0])
    tab.page.wait_for_selector(SETTLED, state="attached", timeout=STARTS_WITHIN)
    yield tab.page
    tab.close(site[0])


def words(page, selector: str) -> str:
    return page.locator(selector).text_content()


def test_the_folder_is_small_and_has_only_what_is_ours_and_the_core(site):
    sizes = {p.relative_to(site[1]): p.stat().st_size for p in site[1].rglob("*") if p.is_file()}
    core = sum(size for path, size in sizes.items() if path.parts[0] == "pyodide")
    assert sum(sizes.values()) - core < 2e6 and sum(sizes.values()) < 20e6
    assert not [path for path in sizes if path.suffix == ".whl"]


@pytest.mark.parametrize("width", [1100, 400])
def test_the_default_plan_is_painted_before_python(site, browser, shots, width):
    tab = Tab(browser, viewport={"width": width, "height": 900}, color_scheme="dark")
    tab.context.route("**/planner.zip", lambda route: route.abort())
    tab.page.goto(site[0])
    tab.page.wait_for_selector("#chart svg")
    e = lab.plan(**settings_of(first_of(site[1] / "index.html")["state"]["fragment"])).estimate
    assert verdict(e)[1] in words(tab.page, "#verdict")
    assert "104 GiB" in words(tab.page, "#figures")
    assert tab.page.locator(".lab-remedy").count() == 3
    assert tab.page.locator("#chart svg").first.bounding_box()["width"] > min(370, width / 2)
    assert tab.page.evaluate("() => document.documentElement.scrollWidth") <= width
    tab.page.screenshot(path=shots / f"web-{width}-dark.png", full_page=True)
    tab.page.wait_for_selector("#status:has-text('did not start')")  # and it says why
    assert verdict(e)[1] in words(tab.page, "#verdict")
    assert tab.page.locator("#controls[inert]").count() == 1
    tab.close(site[0])


def test_all_by_keyboard(planner):
    page = planner
    show(page, "")
    page.locator("h1").click()
    seen = []
    for _ in range(60):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("() => document.activeElement.id"))
        if seen[-1] == "control-gpus":
            break
    assert {"control-stage", "control-model", "control-hardware"} < set(seen)
    before = words(page, "#figures")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#verdict:has-text('on each H100')")
    assert page.locator("#control-gpus").get_attribute("aria-valuetext") == "2"
    assert words(page, "#figures") != before
    page.wait_for_selector("html[data-settled*='gpus=2']", state="attached")
    # The address is the plan: a notebook opens it, and gives the same one.
    opened = lab.planner(page.url)
    assert (
        opened.state["gpus"] == 2 and opened.link.partition("#")[2] == urlsplit(page.url).fragment
    )
    # A change that is offered, and back.
    page.locator(".lab-remedy").first.focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#verdict:has-text('✓')")
    page.locator("#undo").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector("#verdict:has-text('✗')")


def test_controls_have_names_and_the_picture_has_words(planner):
    show(planner, "")
    tree = planner.locator("main").aria_snapshot()
    for said in ('combobox "Stage"', 'slider "Devices"', 'checkbox "Recompute activations"'):
        assert said in tree
    said = planner.locator("#chart svg[role=img]").first.get_attribute("aria-label")
    assert "together: 103.6; policy: 46.76" in said


def files_of(page) -> dict[str, str]:
    """The files that the page offers, by name."""
    shown = page.locator("#files .file:not([hidden]) pre").all()
    return {pre.get_attribute("aria-label"): pre.text_content() for pre in shown}


def test_the_figures_are_those_of_lab_plan_to_the_last_digit(planner):
    bundled = {"stage": "ppo", "model": "tiny", "hardware": "laptop"}
    layouts = (
        lab.planner(**bundled, **more).link for more in ({}, {"layout": "adapters", "lora_r": 8})
    )
    for fragment in [*(link.partition("#")[2] for link in layouts), *random_fragments(18, seed=33)]:
        show(planner, fragment)
        settings = settings_of(fragment)
        plan = lab.plan(**settings)
        assert ledger_of(planner) == plan.ledger.to_jsonl(), fragment
        assert verdict(plan.estimate)[1] in words(planner, "#verdict")
        assert words(planner, "#code pre") == call(settings)
        try:
            config = plan.accelerate_config()
        except ValueError as error:
            config = f"# {error}\n"
        files = {"accelerate.yaml": config}
        if STAGES[plan.stage].trainer:
            files["trl.yaml"] = plan.trl_config()
        assert files_of(planner) == files, fragment


@pytest.mark.parametrize("name", ["model", "stage", "hardware", "lora_target_modules", HOSTILE])
def test_hostile_text_in_the_address_stays_text(planner, name):
    show(planner, f"{quote(name)}={quote(HOSTILE)}")
    shown = words(planner, "#verdict") + words(planner, "#controls")
    assert "<img src=x" in shown
    assert planner.locator("img, main script").count() == 0
    assert planner.evaluate("() => window.hacked") is None


def test_an_address_that_is_no_plan_says_so_and_the_controls_go_on(planner):
    show(planner, "hardware=here&gpus=2")
    assert "choose a device" in words(planner, "#verdict")
    assert planner.locator("#answer.stale").count() == 1
    planner.locator("#control-stage").select_option("SFT")
    planner.wait_for_selector("#verdict:has-text('✓')")
    assert planner.locator("#answer.stale").count() == 0
    show(planner, "model=someone/else")
    assert "lab.planner takes any other" in words(planner, "#verdict")
    show(planner, "gpus=6&hardware=h100&data=%2Fetc%2Fpasswd")
    assert "cannot give data" in words(planner, "#verdict")
    show(planner, "gpus=6")  # no choice of the slider, and shown all the same
    assert planner.locator("#control-gpus").get_attribute("aria-valuetext") == "6"


def test_it_fits_a_phone_and_follows_the_theme(planner, shots):
    show(planner, "stage=ppo&gpus=8&sharding=fsdp2&layout=shared&seed=1")
    planner.set_viewport_size({"width": 400, "height": 860})
    for theme in ("light", "dark"):
        planner.emulate_media(color_scheme=theme)
        planner.screenshot(path=shots / f"web-phone-{theme}.png", full_page=True)
    assert planner.evaluate("() => document.documentElement.scrollWidth") <= 400
    assert planner.locator("[aria-label='Settings without a control'] button").count() == 1
    planner.set_viewport_size({"width": 1100, "height": 900})
    planner.emulate_media(color_scheme="light")


def test_the_picture_is_the_notebooks(site):
    first = first_of(site[1] / "index.html")["state"]
    drawn = zlib.decompress(b64decode(first["svg"])).decode()
    planner = lab.planner(**settings_of(first["fragment"]))
    assert drawn == zlib.decompress(planner.chart.svg).decode()


@pytest.mark.parametrize("width", [1100, 400])
def test_a_stored_run_is_read_without_python_or_scripts(tmp_path, browser, shots, width):
    file = lab.report(ROOT / "notebooks" / "course_runs" / "ppo", tmp_path / "ppo.html")
    context = browser.new_context(
        java_script_enabled=False,
        color_scheme="dark" if width == 400 else "light",
        viewport={"width": width, "height": 900},
    )
    page, asked = context.new_page(), []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert page.locator("figure svg[role=img]").count() >= 5
    assert not page.get_by_text("ppo · step 1", exact=True).first.is_visible()
    page.get_by_text("Step 1", exact=True).click()
    assert page.get_by_text("ppo · step 1", exact=True).first.is_visible()
    token = page.locator("details[open] .t[data-tip]").first
    token.hover()
    shown = token.evaluate("t => getComputedStyle(t, '::after').content")
    assert "1/49 “Once”" in shown and "advantage" in shown
    page.screenshot(path=shots / f"replay-{width}.png", full_page=True)
    context.close()
    assert asked == [file.as_uri()]
