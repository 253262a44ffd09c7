"""The page in a real browser, as somebody sees and uses it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from meliad_edge.event_store import Verdict
from meliad_edge.events import EventKind
from meliad_edge.exemplars import Exemplar
from meliad_edge.monitor.web.server import WebServer
from meliad_edge.stream.reader import ReaderState

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = Path("/usr/bin/chromium")
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason="no Chromium here")
expect = playwright.expect
TOKEN = "correct-horse-battery-staple"
ARGUMENTS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
PATIENCE_MS = 20_000


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        expect.set_options(timeout=PATIENCE_MS)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS.split())
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Any) -> Iterator[Callable[..., Any]]:
    """Open a page; whatever it says on its console beyond network errors fails the test."""
    contexts, said = [], []

    def open_page(url: str, **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert [text for text in said if not text.startswith("Failed to load resource")] == []


def tile(page: Any, number: int) -> Any:
    return page.locator(".tile").nth(number)


def picture_level(page: Any, number: int) -> float:
    """The mean level of the picture that a tile shows at this moment; -1 without one."""
    return page.evaluate(  # type: ignore[no-any-return]
        """(number) => {
          const image = document.querySelectorAll(".tile img")[number];
          if (!image?.naturalWidth) return -1;
          const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
          const context = canvas.getContext("2d");
          context.drawImage(image, 0, 0, 1, 1);
          return context.getImageData(0, 0, 1, 1).data[0];
        }""",
        number,
    )


def wait_for(page: Any, condition: Callable[[], bool]) -> None:
    for _ in range(PATIENCE_MS // 50):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError("it did not happen")


def test_the_live_picture_is_that_of_the_camera(site: Any, open_page: Any, pictures: Any) -> None:
    site.watch.decide("belt", pictures(40))
    page = open_page(site.url)
    wait_for(page, lambda: abs(picture_level(page, 0) - 40) < 6)
    site.watch.decide("belt", pictures(90))
    wait_for(page, lambda: abs(picture_level(page, 0) - 90) < 6)
    expect(tile(page, 0).locator("[data-field=score]")).to_have_text("90.00")
    expect(tile(page, 0).locator(".state")).to_have_text("Normal")
    expect(tile(page, 1).locator(".cover")).to_have_text("No picture yet")


def test_evidence_can_be_hidden(site: Any, open_page: Any, pictures: Any) -> None:
    site.watch.decide("belt", pictures(150))  # Evidence all over the picture.
    page = open_page(site.url)
    wait_for(page, lambda: picture_level(page, 0) >= 0 and abs(picture_level(page, 0) - 150) > 10)
    tile(page, 0).get_by_label("Evidence").uncheck()
    wait_for(page, lambda: abs(picture_level(page, 0) - 150) < 6)


def test_states_are_told_in_words(site: Any, open_page: Any, pictures: Any) -> None:
    watch = site.watch
    for name in watch.names:
        watch.decide(name, pictures(40))
    page = open_page(site.url)
    expect(page.locator("#overall")).to_have_text("All normal")
    event = watch.begin_anomaly("belt")
    watch.begin_condition(watch.names[1], EventKind.CAMERA, "frozen", "the same picture for 12 s")
    watch.begin_condition(watch.names[1], EventKind.DRIFT, "higher", "1.8 spreads above")
    watch.readers[watch.names[2]].state = ReaderState.WAITING
    expect(tile(page, 0).locator(".state")).to_have_text("Anomaly")
    expect(tile(page, 1).locator(".state")).to_have_text("Frozen picture")
    expect(tile(page, 1).locator(".badges")).to_contain_text("Scores drift: higher: 1.8 spreads above")
    expect(tile(page, 2).locator(".state")).to_have_text("Lost, trying again")
    expect(tile(page, 2).locator(".cover")).to_contain_text("Last picture of")
    expect(page.locator("#overall")).to_have_text("1 with an anomaly · 1 lost · 1 to look after")
    expect(page).to_have_title(re.compile("▲ 1 with an anomaly"))
    watch.end(event)
    expect(tile(page, 0).locator(".state")).to_have_text("Normal")


def test_a_new_alarm_is_announced_and_comes_first(site: Any, open_page: Any) -> None:
    site.watch.begin_anomaly("belt")
    page = open_page(site.url)
    expect(page.locator(".event")).to_have_count(1)
    expect(page.locator("#announcements")).to_be_empty()
    site.watch.begin_anomaly(site.watch.names[1])
    expect(page.locator(".event")).to_have_count(2)
    expect(page.locator(".event .camera").first).to_have_text(site.watch.names[1])
    expect(page.locator("#announcements")).to_contain_text(f"Anomaly on {site.watch.names[1]}")
    assert page.locator("#announcements").get_attribute("aria-live") == "polite"


def test_an_event_is_judged_with_the_mouse(site: Any, open_page: Any) -> None:
    event = site.watch.begin_anomaly("belt")
    page = open_page(site.url)
    confirm = page.locator(".event").get_by_role("button", name="Confirm")
    confirm.click()
    expect(confirm).to_have_attribute("aria-pressed", "true")
    assert site.watch.store.event(event.id).verdict is Verdict.CONFIRMED
    page.locator(".event").get_by_role("button", name="Reject").click()
    expect(confirm).to_have_attribute("aria-pressed", "false")
    assert site.watch.store.event(event.id).verdict is Verdict.REJECTED


def test_events_are_judged_with_the_keyboard(site: Any, open_page: Any) -> None:
    watch = site.watch
    older, newer = watch.begin_anomaly("belt"), watch.begin_anomaly("belt")

    def verdicts() -> list[Verdict | None]:
        return [watch.store.event(event.id).verdict for event in (older, newer)]

    page = open_page(site.url)
    expect(page.locator(".event")).to_have_count(2)
    page.keyboard.press("j")
    expect(page.locator(".event").first).to_be_focused()
    page.keyboard.press("c")
    wait_for(page, lambda: verdicts() == [None, Verdict.CONFIRMED])
    page.keyboard.press("j")
    page.keyboard.press("r")
    wait_for(page, lambda: verdicts() == [Verdict.REJECTED, Verdict.CONFIRMED])
    page.keyboard.press("u")
    wait_for(page, lambda: verdicts() == [None, Verdict.CONFIRMED])
    page.keyboard.press("u")
    wait_for(page, lambda: verdicts() == [None, None])
    page.keyboard.press("k")
    page.keyboard.press("Enter")
    expect(page.locator("#detail")).to_be_visible()
    page.keyboard.press("r")
    wait_for(page, lambda: verdicts() == [None, Verdict.REJECTED])
    expect(page.locator("#detail [data-verdict=rejected]")).to_have_attribute("aria-pressed", "true")


def test_keys_are_not_taken_from_a_field(site: Any, open_page: Any) -> None:
    event = site.watch.begin_anomaly("belt")
    page = open_page(site.url)
    expect(page.locator(".event")).to_have_count(1)
    page.keyboard.press("j")
    expect(page.locator(".event")).to_be_focused()
    page.locator("#filter select").first.focus()
    page.keyboard.press("c")
    page.locator("#open-threshold").click()
    expect(page.locator("#threshold")).to_be_visible()
    page.keyboard.press("c")
    page.keyboard.press("Escape")
    page.locator(".event").focus()
    page.keyboard.press("r")  # The first that counts.
    wait_for(page, lambda: site.watch.store.event(event.id).verdict is not None)
    assert site.watch.store.event(event.id).verdict is Verdict.REJECTED
    page.keyboard.press("u")
    wait_for(page, lambda: site.watch.store.event(event.id).verdict is None)


def test_what_others_judge_is_seen(site: Any, open_page: Any) -> None:
    event = site.watch.begin_anomaly("belt")
    page = open_page(site.url)
    expect(page.locator(".event")).to_have_count(1)
    site.watch.store.judge(event.id, Verdict.REJECTED)
    expect(page.locator(".event [data-verdict=rejected]")).to_have_attribute("aria-pressed", "true")


def test_events_are_filtered_and_paged(site: Any, open_page: Any) -> None:
    watch = site.watch
    for _ in range(32):
        event = watch.begin_anomaly("belt")
    watch.begin_anomaly(watch.names[1])
    watch.store.judge(event.id, Verdict.CONFIRMED)
    page = open_page(site.url)
    expect(page.locator(".event")).to_have_count(30)
    page.get_by_role("button", name="Older events").click()
    expect(page.locator(".event")).to_have_count(33)
    page.get_by_role("combobox", name="Camera").select_option(watch.names[1])
    expect(page.locator(".event")).to_have_count(1)
    page.get_by_role("combobox", name="Camera").select_option("")
    page.get_by_role("combobox", name="Verdict").select_option("confirmed")
    expect(page.locator(".event")).to_have_count(1)
    page.get_by_role("combobox", name="Verdict").select_option("rejected")
    expect(page.locator("#no-events")).to_have_text("No event matches the filter.")


def test_an_event_is_shown_with_its_pictures_and_its_clip(site: Any, open_page: Any) -> None:
    event = site.watch.begin_anomaly("belt")
    for number, level in enumerate((30, 90, 150)):
        _, data = cv2.imencode(".jpg", np.full((90, 120, 3), level, np.uint8))
        site.watch.store.add_files(event.id, {f"clip-{number:03d}.jpg": data.tobytes()})
    page = open_page(site.url)
    page.locator(".event .thumb").click()
    detail = page.locator("#detail")
    expect(detail.get_by_role("heading")).to_have_text("belt: Anomaly, going on")
    expect(detail.locator("#regions tbody tr")).to_have_count(1)
    expect(detail.locator("#stage")).to_have_js_property("naturalWidth", 320)
    detail.get_by_role("button", name="Frame").click()
    expect(detail.locator("#stage")).to_have_attribute("src", re.compile(r"frame\.png"))
    detail.get_by_role("button", name="Clip").click()
    expect(detail.locator("#stage")).to_have_attribute("src", re.compile(r"clip-000\.jpg"))
    slider = detail.get_by_label("Frame of the clip")
    slider.press("ArrowRight")
    slider.press("ArrowRight")
    expect(detail.locator("#clip-place")).to_have_text("Frame 3 of 3")
    expect(detail.locator("#stage")).to_have_js_property("naturalWidth", 120)
    page.keyboard.press("Escape")
    expect(detail).to_be_hidden()


def test_the_threshold_is_changed_in_two_steps(site: Any, open_page: Any) -> None:
    predictor, shipped = site.watch.predictor, site.watch.threshold.shipped
    page = open_page(site.url)
    expect(page.locator("#threshold-now")).to_have_text("99.98")
    page.locator("#open-threshold").click()
    field = page.get_by_label("Accepted false alarms in percent")
    expect(field).to_have_value("1")
    field.fill("10")
    preview = page.locator("#preview")
    expect(preview).to_contain_text("expect at most 10 % of normal pictures to alarm")
    expect(preview).to_contain_text(re.compile(r"From 99 calibration images; with 95 % confidence below 1\d %"))
    page.get_by_role("button", name="Apply…").click()
    expect(page.locator("#confirm-text")).to_contain_text("Change the threshold from 99.98 to 90.50?")
    assert predictor.bundle.calibration == shipped, "not before it is confirmed"
    page.get_by_role("button", name="Change it").click()
    expect(page.locator("#threshold-now")).to_have_text("90.50")
    assert predictor.bundle.calibration == site.watch.threshold.preview(false_alarm_rate=0.1)
    page.locator("#open-threshold").click()
    page.get_by_label("Threshold, a score").fill("55.5")
    expect(preview).to_contain_text("Threshold 55.50: expect at most 45 %")
    page.get_by_role("button", name="Apply…").click()
    page.get_by_role("button", name="Keep it as it is").click()
    assert predictor.bundle.calibration.threshold != 55.5
    page.get_by_role("button", name="Apply…").click()
    page.get_by_role("button", name="Change it").click()
    expect(page.locator("#threshold-now")).to_have_text("55.50")
    assert predictor.bundle.calibration.threshold == 55.5
    page.locator("#open-threshold").click()
    page.get_by_role("button", name="Back to the model’s own").click()
    expect(page.locator("#threshold-now")).to_have_text("99.98")
    assert predictor.bundle.calibration == shipped


def test_a_rate_that_so_few_images_cannot_promise_is_not_promised(site: Any, open_page: Any) -> None:
    page = open_page(site.url)
    page.locator("#open-threshold").click()
    page.get_by_label("Accepted false alarms in percent").fill("0.1")
    expect(page.locator("#preview")).to_contain_text("expect at most 1.0 %")
    expect(page.locator("#preview .warning")).to_contain_text("So few images cannot promise 0.10 %")
    page.get_by_label("Accepted false alarms in percent").fill("200")
    expect(page.locator("#threshold-problem")).to_contain_text("less than 1")
    expect(page.get_by_role("button", name="Apply…")).to_be_disabled()


def test_hostile_names_are_text(site: Any, open_page: Any, pictures: Any) -> None:
    watch = site.watch
    hostile = watch.names[2]
    patch = pictures(40, size_hw=(48, 48))
    exemplar = Exemplar("<script>document.title='hacked'</script>", "<b>x</b>.png", 0, 0, 8, 8, patch)
    watch.predictor.bundle = replace(watch.predictor.bundle, exemplars=[exemplar])
    watch.predictor.engine.nearest = 0
    watch.begin_anomaly(hostile)
    watch.board.record_notice(hostile, "<img src=x onerror=document.title='hacked'>")
    page = open_page(site.url)
    expect(tile(page, 2).locator("h3")).to_have_text(hostile)
    expect(page.locator(".event .camera")).to_have_text(hostile)
    expect(page.locator(".event .what")).to_contain_text("like ‘<script>document.title='hacked'</script>’")
    page.locator(".event .thumb").click()
    expect(page.locator("#regions tbody td").last).to_contain_text("<script>document.title='hacked'</script>")
    tile(page, 2).locator("summary").evaluate("(summary) => summary.click()")
    expect(tile(page, 2).locator("details dl")).to_contain_text("<img src=x onerror=")
    assert "hacked" not in page.title()
    assert page.locator("script:not([src]), main b, main img[onerror]").count() == 0


def test_no_script_but_the_packaged_ones_can_run(site: Any, browser: Any) -> None:
    page = browser.new_page()
    page.goto(site.url)
    blocked = page.evaluate(
        """() => new Promise((resolve) => {
          document.addEventListener("securitypolicyviolation", (event) => resolve(event.effectiveDirective));
          const script = document.createElement("script");
          script.textContent = "document.title = 'hacked'";
          document.body.append(script);
          setTimeout(() => resolve("nothing"), 5000);
        })"""
    )
    page.close()
    assert blocked == "script-src-elem"


@pytest.mark.parametrize("width", [320, 375])
def test_a_phone_needs_no_horizontal_scrolling(site: Any, open_page: Any, pictures: Any, width: int) -> None:
    watch = site.watch
    for name in watch.names:
        watch.decide(name, pictures(40))
        watch.begin_anomaly(name)
    page = open_page(site.url, viewport={"width": width, "height": 700})
    expect(page.locator(".event")).to_have_count(3)
    wide = "document.documentElement.scrollWidth > window.innerWidth"
    assert not page.evaluate(wide)
    page.locator(".event .thumb").first.click()
    expect(page.locator("#detail")).to_be_visible()
    inside = (
        "(element) => element.scrollWidth <= element.clientWidth && element.getBoundingClientRect().right <= innerWidth"
    )
    assert page.locator("#detail").evaluate(inside)
    page.keyboard.press("Escape")
    page.locator("#open-threshold").click()
    assert page.locator("#threshold").evaluate(inside)
    assert not page.evaluate(wide)


CONTRASTS = """() => {
  const numbers = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b]
    .map((value) => value / 255)
    .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4))
    .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
  const ground = (element) => {
    for (let at = element; at; at = at.parentElement) {
      const [r, g, b, alpha = 1] = numbers(getComputedStyle(at).backgroundColor);
      if (alpha === 1) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const element of document.querySelectorAll("body *")) {
    const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!hasText || !element.checkVisibility({ opacityProperty: true, visibilityProperty: true })) continue;
    if (element.closest(".screen, .visually-hidden, .skip, :disabled, script, template, noscript, option")) continue;
    const [one, other] = [numbers(getComputedStyle(element).color), ground(element)].map(luminance);
    const contrast = (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    found.push([contrast, element.tagName + "." + element.className + ": " + element.textContent.trim().slice(0, 40)]);
  }
  return found;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(site: Any, open_page: Any, pictures: Any, scheme: str) -> None:
    watch = site.watch
    watch.begin_anomaly("belt")
    judged = [watch.begin_anomaly(watch.names[1]) for _ in range(2)]
    watch.store.judge(judged[0].id, Verdict.CONFIRMED)
    watch.store.judge(judged[1].id, Verdict.REJECTED)
    for event in judged:
        watch.end(event)
    watch.begin_condition(watch.names[1], EventKind.CAMERA, "frozen", "the same picture for 12 s")
    watch.readers[watch.names[2]].state = ReaderState.WAITING
    page = open_page(site.url, color_scheme=scheme)
    expect(page.locator(".event")).to_have_count(4)
    expect(tile(page, 1).locator(".state")).to_have_text("Frozen picture")
    page.locator("#open-threshold").click()
    expect(page.locator("#preview")).to_contain_text("expect at most")
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 60
    assert [entry for entry in contrasts if entry[0] < 4.5] == []


def test_dark_is_dark(site: Any, open_page: Any, tmp_path: Path) -> None:
    levels = {}
    for scheme in ("light", "dark"):
        page = open_page(site.url, color_scheme=scheme)
        expect(page.locator(".tile")).to_have_count(3)
        path = tmp_path / f"{scheme}.png"
        page.screenshot(path=path)
        levels[scheme] = cv2.imread(str(path)).mean()
    assert levels["dark"] < 60 < 120 < levels["light"]


def test_every_control_has_a_name(site: Any, open_page: Any) -> None:
    site.watch.begin_anomaly("belt")
    page = open_page(site.url)
    expect(page.locator(".event")).to_have_count(1)
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll("button, input, select, img, svg[role=img]")]
          .filter((control) => control.checkVisibility())
          .filter((control) => !(control.getAttribute("aria-label") || control.textContent.trim()
            || control.closest("label")?.textContent.trim() || control.hasAttribute("alt")))
          .map((control) => control.outerHTML.slice(0, 120))"""
    )
    assert unnamed == []
    assert page.get_by_role("main").count() == page.get_by_role("banner").count() == 1
    expect(page.locator(".tile svg").first).to_have_attribute("aria-label", re.compile("Last 10 min: highest"))


def test_the_page_says_that_the_watch_is_gone_and_comes_back(watch: Any, open_page: Any, pictures: Any) -> None:
    watch.decide("belt", pictures(40))
    server = WebServer(watch.make_app())
    url = server.start()
    page = open_page(url)
    expect(tile(page, 0).locator(".state")).to_have_text("Normal")
    server.stop()
    expect(page.locator("#lost")).to_contain_text("No connection to the watch since")
    expect(page.locator("#overall")).to_have_text("No connection")
    event = watch.begin_anomaly("belt")
    server = WebServer(watch.make_app(), port=int(url.rpartition(":")[2]))
    server.start()
    expect(page.locator("#lost")).to_be_hidden()
    expect(tile(page, 0).locator(".state")).to_have_text("Anomaly")
    expect(page.locator(".event")).to_have_attribute("data-id", event.id)
    wait_for(page, lambda: picture_level(page, 0) >= 0)
    server.stop()


def test_a_watch_of_other_cameras_begins_anew(watch: Any, other_watch: Any, open_page: Any, pictures: Any) -> None:
    watch.decide("belt", pictures(40))
    server = WebServer(watch.make_app())
    url = server.start()
    page = open_page(url)
    expect(page.locator(".tile")).to_have_count(3)
    server.stop()
    server = WebServer(other_watch.make_app(), port=int(url.rpartition(":")[2]))
    server.start()
    expect(page.locator(".tile h3")).to_have_text(["oven"])
    server.stop()


def test_somebody_logs_in_and_out(locked_site: Any, open_page: Any) -> None:
    page = open_page(locked_site.url)
    expect(page).to_have_url(f"{locked_site.url}/login")
    page.get_by_label("Token").fill("a-wrong-token")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator("#problem")).to_have_text("this is not the token")
    page.get_by_label("Token").fill(TOKEN)
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".tile")).to_have_count(3)
    assert page.evaluate("document.cookie") == "", "no script sees the session"
    page.get_by_role("button", name="Log out").click()
    expect(page).to_have_url(f"{locked_site.url}/login")
    page.goto(locked_site.url)
    expect(page).to_have_url(f"{locked_site.url}/login")
