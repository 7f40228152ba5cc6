"""Pages that need nothing else, in which text stays text."""

import base64
import io

from matplotlib.figure import Figure
from PIL import Image

from bn_lightning.reports.document import document, fragment, picture, table


def test_a_page_is_whole_and_its_title_text():
    page = document("a <script>", "<p>body</p>")
    assert page.startswith("<!doctype html>")
    assert page.rstrip().endswith("</html>")
    assert '<meta charset="utf-8">' in page
    assert "<title>a &lt;script&gt;</title>" in page
    assert fragment("<p>body</p>") in page


def test_the_style_of_a_fragment_leaves_the_page_around_it_alone():
    style = fragment("").split("<style>")[1].split("</style>")[0]
    rules = style.replace("@media print{", "").split("}")
    selectors = [each for rule in rules if "{" in rule for each in rule.split("{")[0].split(",")]
    assert len(selectors) > 10
    assert all(selector.strip().startswith(".bnl-report") for selector in selectors)


def test_a_picture_is_inside_and_can_be_read():
    image = picture(Figure(figsize=(2, 1), dpi=50), 'a "quoted" <alt>')
    assert 'alt="a &quot;quoted&quot; &lt;alt&gt;"' in image
    data = base64.b64decode(image.split("base64,")[1].split('"')[0])
    assert Image.open(io.BytesIO(data)).size == (100, 50)


def test_a_table_escapes_its_cells_and_sets_numbers_to_the_right():
    made = table(("name<", "n"), [("<b>", "1"), ("&", "2")], numbers=(1,))
    assert "<th>name&lt;</th>" in made
    assert "<td>&lt;b&gt;</td>" in made
    assert "<td>&amp;</td>" in made
    assert made.count('class="number"') == 3
    assert made.count("<tr>") == 3
