"""HTML to text: an article without its surroundings, and fragments as a browser would show them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from resiliparse.extract.html2text import extract_plain_text

from fastlm.data.clean import make_step
from fastlm.data.document import Document, Dropped


def run(name, text, **options):
    result = make_step(name, **options)(Document(text, "a", 1))
    return result if isinstance(result, Dropped) else result.text


ARTICLE = "".join(f"<p>The {word} paragraph of the article says something of its own, at some length.</p>" for word in
                  ("first", "second", "third", "fourth"))  # fmt: skip
WHOLE = f"""<!doctype html><html><head><title>T</title><style>p {{}}</style><script>var a = "hidden"</script></head>
<body><nav><ul><li><a href="/">Home</a></li><li><a href="/news">News</a></li></ul></nav>
<header>Site name</header><main><article><h1>The heading</h1>{ARTICLE}<p>“全角标点，也要保留！”</p></article></main>
<aside class="sidebar">Related links</aside><footer>All rights reserved</footer></body></html>"""


def test_a_page_gives_its_article_and_not_what_is_around_it():
    text = run("html_page", WHOLE)
    for wanted in ("The heading", "The first paragraph", "The fourth paragraph", "“全角标点，也要保留！”"):
        assert wanted in text
    for unwanted in ("Home", "News", "Related links", "All rights reserved", "hidden", "<"):
        assert unwanted not in text
    assert text == extract_plain_text(WHOLE, main_content=True, alt_texts=False, comments=False)
    assert "Home" in run("html_page", WHOLE, main_content=False)


def test_bulleted_lists_are_kept_where_all_of_the_page_is():
    items = "<ul><li>500 g of flour</li><li>10 g of salt</li></ul>"
    page = f"<html><body><main><h1>Bread</h1><p>Take these.</p>{items}<p>Bake.</p></main></body></html>"
    text = run("html_page", page, main_content=False)
    assert text.index("Take these.") < text.index("500 g of flour") < text.index("10 g of salt") < text.index("Bake.")


@pytest.mark.parametrize("name", ["html_page", "html_fragment"])
def test_pages_without_text_are_dropped_and_plain_text_stays(name):
    for text in ("<html></html>", "<script>alert(1)</script>", "<p> </p>", "<!-- only a comment -->"):
        assert run(name, text) == Dropped("empty")
    for text in ("plain\n\ntext  with blanks", "a < b && c > d, AT&T; R&D", "", "中文，没有标记"):
        assert run(name, text) == text


@pytest.mark.parametrize(
    ("fragment", "text"),
    [
        ("one<br>two<br/>three<BR />four", "one\ntwo\nthree\nfour"),
        ("<p>One <b>bo</b>ld\n  word.</p><p>Two</p>", "One bold word.\nTwo"),
        ("&lt;b&gt; &amp;amp; &#20013;&#x6587; &eacute;", "<b> &amp; 中文 é"),
        ("a&nbsp;b <i> c </i> d", "a\u00a0b c d"),
        ("<ul><li>one<li>two</ul>after", "one\ntwo\nafter"),
        ("<table><tr><td>a</td><td>b</td></tr><tr><th>c</th><td>d</td></tr></table>", "a\tb\nc\td"),
        ("before<pre>  x = 1\n    y</pre>after", "before\n  x = 1\n    y\nafter"),
        ("<div><div>deep</div></div> tail", "deep\ntail"),
        ("x<script>alert(1)</script>y<style>p{}</style>z<!-- no -->", "xyz"),
        ("<p>全角，</p><p>标点！</p>", "全角，\n标点！"),
        ("unclosed <b>tag and </i> wrong end", "unclosed tag and wrong end"),
        ("if a < b then <em>c</em>", "if a < b then c"),
        ("<p>one</p>\n\n<p>two</p>\n", "one\ntwo"),
        ("a<br><br>b", "a\n\nb"),
    ],
)
def test_a_fragment_reads_as_it_is_shown(fragment, text):
    assert run("html_fragment", fragment) == text


def test_nesting_deeper_than_calls_go():
    assert run("html_fragment", "<div>" * 5000 + "deep" + "</div>" * 5000) == "deep"


PARTS = ["<p>", "</p>", "<b>", "</b>", "<br>", "word", " ", "\n", "&amp;", "<td>", "<li>", " < ", "<!-- a -->"]


@given(st.lists(st.sampled_from(PARTS), max_size=20))
@settings(max_examples=100, deadline=None)
def test_no_word_of_a_fragment_is_lost(parts):
    result = run("html_fragment", "".join(parts))
    text = "" if isinstance(result, Dropped) else result
    assert text.count("word") == parts.count("word")
