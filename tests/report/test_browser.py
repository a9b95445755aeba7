"""A page in a real browser: sound at both widths in both themes, and every control does what it says."""

import base64
import csv
import io
import shutil

import pytest
import torch

import signal_reid
from signal_reid.evaluation import FeatureSet, match_ranks, rank_gallery, retrieval_metrics
from signal_reid.figures import Layer, LayeredImages, Picture
from signal_reid.figures.style import drawing_style, new_figure
from signal_reid.report import Headline, Ranking, RunReport, write_report
from signal_reid.report.ablation_table import SeedResult, VariantResult, ablation_csv, ablation_table
from signal_reid.report.comparison import ComparedRun, Disagreement, disagreements
from signal_reid.report.comparison_page import Comparison, Lead, write_comparison
from signal_reid.report.embedding import embedding_map, map_picture, similarities, similarities_picture
from signal_reid.report.page_pictures import page_picture, sample_pictures
from signal_reid.report.tables import file_uri

sync_api = pytest.importorskip("playwright.sync_api", reason="a browser is driven with playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="contrast and names are checked by axe")

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
HOSTILE = '"><img src=x onerror="window.hacked=1"><script>window.hacked=1</script>'
LEVELS = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]
RULES = {"runOnly": LEVELS, "resultTypes": ["violations"]}
CONTRAST = {"runOnly": {"type": "rule", "values": ["color-contrast"]}, "resultTypes": ["violations"]}


def images(count):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, 3, 3, 32, 16), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def ranking():
    return ranking_of(1)


def ranking_of(seed):
    labels = torch.arange(12)
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(seed))
    items = FeatureSet(features, labels % 4, labels // 4)
    names = [f"q{i:02}.jpg" for i in range(11)] + [f"=1+1{HOSTILE}"]
    precision = retrieval_metrics(items, items).average_precision
    return Ranking(items, items, rank_gallery(items, items, top=5), precision, match_ranks(items, items), names, names)


@pytest.fixture(scope="module")
def address(tmp_path_factory, ranking):
    """The page of a small run that has everything."""
    shown, sets = images(12), (ranking.query, ranking.gallery)
    with drawing_style():
        figure = new_figure("page", 2)
        figure.add_subplot().imshow(shown[0, 0].permute(1, 2, 0).numpy())
    kept = torch.rand(1, 3, 4, 2, generator=torch.Generator().manual_seed(2)) > 0.4
    layers = [Layer("kept by any", kept), Layer(f"kept by {HOSTILE}", ~kept)]
    layered = LayeredImages(shown[:1], ["q00.jpg"], ("RGB", "NI", "TI"), (0, 0, 32, 16), layers)
    tokens = Picture("tokens", "Tokens", figure, "what is kept", layers=[layered])
    lists = ranking.lists([0, 11, 5], lambda i: shown[i], lambda i: shown[i])
    lists[0] = type(lists[0])(**{**vars(lists[0]), "pictures": sample_pictures(tokens)["q00.jpg"]})
    history = [{"kind": "step", "epoch": 1, "step": s, "total": 4 / s, "head": 3 / s} for s in range(1, 9)]
    history += [{"kind": "eval", "epoch": e, "step": e, "mAP": 0.2 * e, "rank1": 0.3 * e} for e in (1, 2, 3)]
    drawn = (map_picture(embedding_map(ranking.gallery)), similarities_picture(similarities(*sets, "camera")), tokens)
    path = tmp_path_factory.mktemp("page") / "report.html"
    report = RunReport(
        f"Run {HOSTILE}",
        [("data set", HOSTILE)],
        [Headline("before", 0.1, 0.2, 0.3, 0.4), Headline(HOSTILE, 0.8, 0.9, 1, 1)],
        history,
        lists,
        f"data: {HOSTILE}\n",
        [("PyTorch", "2")],
        queries=ranking.results(),
        pictures=[page_picture(picture, picture.name) for picture in drawn],
    )
    write_report(path, report)
    return path.as_uri()


@pytest.fixture(scope="module")
def compared(ranking):
    """Two runs with hostile names, the second of which ranks otherwise."""
    config = signal_reid.load_config("rgbnt201")
    other = ranking_of(3)
    history = [{"kind": "step", "epoch": 1, "step": s, "total": 4 / s, "head_0": 3 / s} for s in range(1, 9)]
    numbers = dict.fromkeys(("mAP", "rank1", "rank5", "rank10", "mINP"), 0.5)
    history += [{"kind": "eval", "epoch": e, "step": e, **numbers, "mAP": 0.2 * e} for e in (1, 2, 3)]
    settings = [config, signal_reid.load_config("rgbnt201", ["losses.triplet=0.5"])]
    rankings = dict(zip(("one", f"two {HOSTILE}"), (ranking, other), strict=True))
    gallery = [(name, 0) for name in ranking.gallery_names]
    runs = [
        ComparedRun(name, config, history, of_run.results(), gallery)
        for (name, of_run), config in zip(rankings.items(), settings, strict=True)
    ]
    shown, chosen = images(12), disagreements(runs, 2)
    lists = [of_run.lists(chosen, lambda i: shown[i], lambda i: shown[i]) for of_run in rankings.values()]
    found = []
    for place, i in enumerate(chosen):
        query = runs[0].results[i]
        of_query = list(zip(rankings, (each[place] for each in lists), strict=True))
        found.append(Disagreement(query.name, query.identity, query.camera, of_query, 0.5))
    return runs, found


@pytest.fixture(scope="module")
def comparison(tmp_path_factory, compared):
    """The page of two runs."""
    path = tmp_path_factory.mktemp("comparison") / "comparison.html"
    write_comparison(path, Comparison(f"Runs {HOSTILE}", *compared, ("RGB", "NI", "TI")))
    return path.as_uri()


@pytest.fixture(scope="module")
def ablation(tmp_path_factory, compared):
    """The page of an ablation of them."""
    last = {"mAP": 0.6, "rank1": 0.7, "rank5": 0.8, "rank10": 0.9, "mINP": 0.1, "epoch": 3}
    results = [VariantResult(run.name, [], 10**6, 10**9, [SeedResult(0, last, last)]) for run in compared[0]]
    downloads = [("ablation.csv", file_uri(ablation_csv(results), "ablation.csv"))]
    leads = [Lead(ablation_table(results), [f"A note {HOSTILE}"], downloads)]
    path = tmp_path_factory.mktemp("ablation") / "ablation.html"
    write_comparison(path, Comparison("Ablation", *compared, ("RGB", "NI", "TI"), leads, [f"two: {HOSTILE}"]))
    return path.as_uri()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)  # with a new, empty profile
        yield started
        started.close()


@pytest.fixture
def tab(browser, address):
    """Opens the page; what it complains of or asks the network for fails the test."""
    contexts, troubles = [], []

    def open_page(at=address, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("dialog", lambda dialog: troubles.append(dialog.message))
        page.on("request", lambda request: troubles.append(request.url) if is_outside(request.url, at) else None)
        page.goto(at)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert troubles == []


def is_outside(url, address):
    return not url.startswith("data:") and url.partition("#")[0] != address


VARIANTS = {(1300, "light"): None, (1300, "dark"): CONTRAST, (390, "dark"): None, (390, "light"): RULES}
"""What axe checks by width and colours: contrast depends on the colours, the size of targets on the width."""


@pytest.mark.parametrize("kind", ["address", "ablation"])
def test_a_page_fits_is_legible_and_named_throughout(tab, kind, request):
    page = tab(request.getfixturevalue(kind))
    for details in page.locator("details > summary").all():
        if details.is_visible():
            details.click()
            assert details.evaluate("element => element.parentElement.open")
    for (width, scheme), rules in VARIANTS.items():
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, colour[4:-1].split(", "))) < 3 * 128) == (scheme == "dark")
        found = axe.Axe().run(page, options=rules).response["violations"] if rules else []
        assert [(rule["id"], rule["nodes"][0]["html"]) for rule in found] == []


def test_a_comparison_is_the_page_of_an_ablation_without_its_table(tab, comparison, ablation):
    sections = []
    for place in (comparison, ablation):
        page = tab(place, viewport={"width": 390, "height": 900})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.evaluate("window.hacked") is None
        sections.append(page.get_by_role("navigation").get_by_role("link").all_inner_texts())
    assert ["Ablation", *sections[0]] == sections[1]


def test_every_control_of_a_comparison_does_what_it_says(tab, ablation, compared):
    page = tab(ablation, accept_downloads=True)
    dialog = page.get_by_role("dialog")
    for opener in page.get_by_role("button", name="Enlarge: ").all():
        opener.click()
        assert dialog.get_by_role("heading").inner_text() == opener.get_attribute("aria-label").removeprefix(
            "Enlarge: "
        )
        page.keyboard.press("Escape")
    page.locator("article .frame").first.click()
    assert dialog.get_by_role("heading").inner_text().startswith("Query: identity ")
    dialog.get_by_label("Next picture").click()
    assert dialog.get_by_role("heading").inner_text().startswith("Rank 1, ")
    dialog.get_by_label("Previous picture").click()
    dialog.get_by_label("Close").click()
    assert not dialog.is_visible()
    for name, scheme in (("Dark", "dark"), ("Light", "light"), ("Auto", "light dark")):
        page.get_by_role("button", name=name, exact=True).click()
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == scheme
    for link in page.get_by_role("navigation").get_by_role("link").all():
        link.click()
        assert page.evaluate("document.querySelector(location.hash).getBoundingClientRect().top") < 900
    slider, output = page.get_by_role("slider").first, page.locator(".reading output").first
    slider.focus()
    page.keyboard.press("Home")
    assert output.inner_text() == f"step 1: one 4, two {HOSTILE} 4"
    for summary in page.locator("summary").all():
        summary.click()
    for link in page.locator("a[download]").all():
        with page.expect_download() as found:
            link.click()
        content = base64.b64decode(link.get_attribute("href").partition(",")[2])
        assert found.value.path().read_bytes() == content != b""
    check_filters(page, compared)


def check_filters(page, compared):
    """The controls above the queries order and keep the rows and lists that they say."""
    (one, two), _ = compared
    form, table, lists = page.locator("form.filters"), page.locator("tbody tr.query"), page.locator("article.query")
    worst = {
        a.name: min(a.average_precision, b.average_precision) for a, b in zip(one.results, two.results, strict=True)
    }

    def shown(rows=table):
        return [row.get_attribute("data-name") for row in rows.all() if row.is_visible()]

    every, listed = shown(), shown(lists)
    form.get_by_label("Order").select_option("worst first")
    assert [worst[name] for name in shown()] == sorted(worst[name] for name in every)
    assert [worst[name] for name in shown(lists)] == sorted(worst[name] for name in listed)
    form.get_by_label("Camera").select_option("1")
    assert shown() != []
    assert {row.get_attribute("data-camera") for row in table.all() if row.is_visible()} == {"1"}
    form.get_by_label("Identity").select_option("2")
    assert {row.get_attribute("data-identity") for row in table.all() if row.is_visible()} <= {"2"}
    form.get_by_role("button", name="Reset").click()
    form.get_by_label("Name contains").fill("=1+1")
    assert shown() == [name for name in every if "=1+1" in name]
    form.get_by_role("button", name="Reset").click()
    page.wait_for_function(
        f"document.querySelector('form.filters output').textContent.includes('of {len(every)} queries')"
    )
    assert shown() == every


def test_hostile_names_are_text_and_nothing_injected_runs(tab, browser, address):
    page = tab()
    assert page.evaluate("window.hacked") is None
    assert page.locator("h1").inner_text() == f"Run {HOSTILE}"
    assert page.get_by_text(f"=1+1{HOSTILE}").count() >= 1
    complaining = browser.new_page()
    complaining.goto(address)
    complaining.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.hacked=1\">')")
    complaining.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'hacked=1'}))")
    complaining.wait_for_timeout(50)
    assert complaining.evaluate("window.hacked") is None
    complaining.close()


def test_the_colours_are_the_readers_until_a_button_is_pressed(tab):
    page = tab(color_scheme="light")

    def background():
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = background()
    for name, is_light in (("Dark", False), ("Light", True), ("Dark", False), ("Auto", True)):
        page.get_by_role("button", name=name, exact=True).click()
        assert (background() == light) == is_light
        assert page.locator(".theme [aria-pressed=true]").all_inner_texts() == [name]


def test_a_triplet_is_enlarged_stepped_through_and_closed_by_escape(tab):
    page = tab()
    page.locator("article .frame").first.click()
    dialog = page.get_by_role("dialog")
    assert dialog.get_by_role("heading").inner_text().startswith("Query: identity 0")
    assert dialog.locator(".large img").count() == 3
    assert dialog.locator(".large img").first.bounding_box()["width"] > 200
    assert dialog.get_by_label("Previous picture").is_disabled()
    dialog.get_by_label("Next picture").click()
    assert dialog.get_by_role("heading").inner_text().startswith("Rank 1, ")
    page.keyboard.press("ArrowRight")
    assert dialog.get_by_role("heading").inner_text().startswith("Rank 2, ")
    dialog.get_by_label("Previous picture").click()
    assert dialog.get_by_role("heading").inner_text().startswith("Rank 1, ")
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.dataset.caption").startswith("Rank 1, ")
    page.locator("article .frame").first.click()
    dialog.get_by_label("Close").click()
    assert not dialog.is_visible()


def test_every_drawing_and_figure_is_enlarged(tab):
    page = tab()
    buttons = page.get_by_role("button", name="Enlarge: ").all()
    assert len(buttons) == 5
    for button in buttons:
        button.click()
        title = button.get_attribute("aria-label").removeprefix("Enlarge: ")
        assert page.get_by_role("dialog").get_by_role("heading").inner_text() == title
        assert page.locator(".large > *").bounding_box()["width"] > 400
        page.keyboard.press("Escape")


def test_what_is_enlarged_keeps_its_proportions_and_begins_inside_a_phone(tab):
    page = tab(viewport={"width": 390, "height": 700})
    page.get_by_text("What the model sees in it").click()
    for opener in ("article .stack", "article .frame", ".picture button.small >> nth=-1"):
        page.locator(opener).first.click()
        image = page.locator(".large img").first
        box, natural = image.bounding_box(), image.evaluate("image => image.naturalWidth / image.naturalHeight")
        contained = image.evaluate("image => getComputedStyle(image).objectFit") == "contain"
        assert contained or box["width"] / box["height"] == pytest.approx(natural, rel=0.02)
        assert box["x"] >= 0
        page.keyboard.press("Escape")


def test_a_list_is_one_stop_of_tab_and_its_pictures_go_by_arrow_keys(tab):
    page = tab()
    group = page.locator("article [data-group]").first
    assert group.locator("[data-enlarge][tabindex='0']").count() == 1
    group.locator("[data-enlarge]").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.dataset.caption").startswith("Rank 2, ")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    assert page.get_by_role("dialog").is_visible()


def test_queries_are_ordered_and_filtered(tab, ranking):
    page = tab()
    form, table, lists = page.locator("form.filters"), page.locator("tbody tr.query"), page.locator("article.query")
    page.get_by_text("Results of all 12 queries").click()

    def shown(rows=table):
        return [row.get_attribute("data-name") for row in rows.all() if row.is_visible()]

    results = ranking.results()
    every = [result.name for result in results]
    by_precision = sorted(range(12), key=lambda i: results[i].average_precision)
    assert shown() == every
    form.get_by_label("Order").select_option("worst first")
    assert shown() == [every[i] for i in by_precision]
    listed = [every[i] for i in by_precision if i in (0, 5, 11)]
    assert shown(lists) == listed
    form.get_by_label("Order").select_option("best first")
    assert shown(lists) == sorted(listed, key=lambda name: -results[every.index(name)].average_precision)
    form.get_by_label("Order").select_option("by name")
    assert sorted(shown()) == sorted(every)
    form.get_by_label("Camera").select_option("1")
    form.get_by_label("Identity").select_option("2")
    assert shown() == [result.name for result in results if (result.camera, result.identity) == ("1", 2)] != []
    form.get_by_role("button", name="Reset").click()
    form.get_by_label("Name contains").fill("Q1")
    assert shown() == ["q10.jpg"]
    assert form.locator("output").inner_text() == "Showing 1 of 12 queries, 0 of 3 lists."
    form.get_by_label("Name contains").press("Enter")
    form.get_by_role("button", name="Reset").click()
    page.wait_for_function("document.querySelector('form.filters output').textContent.includes('12 of 12 queries')")
    assert shown() == every


def test_marks_over_the_images_are_switched(tab):
    page = tab()
    page.get_by_text("What the model sees in it").click()
    first, second = page.locator("article .switches input").all()
    marks = [page.locator(f"article .stack g[data-marks='{place}']").first for place in (0, 1)]

    def shown():
        return [group.evaluate("element => getComputedStyle(element).display") != "none" for group in marks]

    assert shown() == [True, False]
    second.check()
    assert shown() == [True, True]
    first.uncheck()
    assert shown() == [False, True]
    page.locator("article .stack").first.click()
    assert page.locator(".large .stack img").count() == 1
    assert page.get_by_role("dialog").get_by_role("heading").inner_text() == "Tokens: RGB"


def test_curves_tell_their_values_to_pointer_and_keyboard(tab):
    page = tab()
    chart = page.locator("svg.chart[data-hover]").first
    slider = page.get_by_role("slider").first
    output = page.locator(".reading output").first
    assert output.inner_text() == "step 8: loss 0.5, head 0.375"
    slider.focus()
    page.keyboard.press("Home")
    assert output.inner_text() == slider.get_attribute("aria-valuetext") == "step 1: loss 4, head 3"
    page.keyboard.press("ArrowRight")
    assert output.inner_text() == "step 2: loss 2, head 1.5"
    box, place = chart.bounding_box(), chart.evaluate("chart => JSON.parse(chart.dataset.hover).place[3]")
    view = chart.evaluate("chart => chart.viewBox.baseVal.width")
    page.mouse.move(box["x"] + place / view * box["width"] + 2, box["y"] + box["height"] / 2)
    assert output.inner_text() == "step 4: loss 1, head 0.75"
    assert float(chart.locator(".cursor").get_attribute("x1")) == place


def test_results_are_downloaded_as_csv(tab, ranking):
    page = tab(accept_downloads=True)
    page.get_by_text("Results of all 12 queries").click()
    with page.expect_download() as found:
        page.get_by_text("Download them as CSV").click()
    assert found.value.suggested_filename == "queries.csv"
    content = found.value.path().read_bytes()
    assert content == base64.b64decode(page.get_by_text("Download").get_attribute("href").partition(",")[2])
    rows = list(csv.DictReader(io.StringIO(content.decode(), newline="")))
    assert [float(row["average_precision"]) for row in rows] == ranking.average_precision.tolist()
    for row in rows:
        ranks = [int(rank) for rank in row["match_ranks"].split()]
        recomputed = sum(k / rank for k, rank in enumerate(ranks, 1)) / len(ranks)
        assert recomputed == pytest.approx(float(row["average_precision"]), rel=1e-12)
    assert rows[-1]["query"] == f"'=1+1{HOSTILE}"


def test_links_lead_to_sections(tab):
    page = tab()
    for link in page.get_by_role("navigation").get_by_role("link").all():
        link.click()
        assert page.evaluate("document.querySelector(location.hash).getBoundingClientRect().top") < 900
    page.keyboard.press("Home")


def test_without_scripts_everything_is_there_but_the_controls(tab):
    page = tab(java_script_enabled=False)
    assert page.locator("article.query").count() == 3
    assert page.locator("[data-needs-script]:visible").count() == 0
    assert page.locator("tbody tr.query").count() == 12
