"""The page at /, in Chromium, against a server process on real weights. Nothing may be asked of anybody else."""

import contextlib
import gzip
import json
import re
import shutil
from pathlib import Path

import pytest
from serving import Server, until

import edgellm
from edgellm.server.page import TYPES

sync_api = pytest.importorskip("playwright.sync_api")
expect = sync_api.expect
expect.set_options(timeout=20_000)

FOLDER = Path(edgellm.__file__).parent / "server" / "page"
ROOT = Path(edgellm.__file__).parents[1]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
GREEDY = {"sampling": {"temperature": 0, "max_tokens": 24}}
FRANCE = "Name the capital of France."


@pytest.fixture(scope="module")
def server(smollm2_path):
    with Server(smollm2_path, "stories260k", "--slots", 4) as server:
        yield server


@pytest.fixture(scope="module")
def name(smollm2_path):
    return smollm2_path.stem


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium is here: apt-get install chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def visit(browser, server):
    """Opens the page, with settings of its own, in a browser of its own; nothing goes wrong in it, or leaves it."""
    with contextlib.ExitStack() as stack:
        asked, wrong = [], []

        def visit(settings=GREEDY, at=server, **options):
            context = stack.enter_context(contextlib.closing(browser.new_context(**options)))
            context.add_init_script(f"localStorage['edgellm-settings'] ??= {json.dumps(json.dumps(settings))}")
            context.on("request", lambda request: asked.append(request.url))
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            page.on("console", lambda told: wrong.append(told.text) if "Security Policy" in told.text else None)
            page.goto(origin(at))
            return page

        yield visit
        assert not wrong
        assert asked
        assert {url for url in asked if not re.match(r"http://127\.0\.0\.1:\d+/|data:|blob:", url)} == set()


def origin(server):
    return f"http://127.0.0.1:{server.port}/"


@pytest.fixture
def page(visit):
    page = visit()
    expect(page.get_by_role("button", name=re.compile("haiku"))).to_be_visible()
    return page


def send(page, text):
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def whole(page):
    """The text of the last answer, when it has come."""
    expect(page.locator(".assistant").last.get_by_label("Copy", exact=True)).to_be_attached()
    return page.locator(".said > .body").last.inner_text()


def sent(page, text):
    send(page, text)
    return whole(page)


def stream(page, *events, ends=True):
    """The next answers of the server are these events."""
    body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + ("data: [DONE]\n\n" if ends else "")
    page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=body))


def delta(**delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


# What is served.


def test_files_are_served_as_they_are_and_kept_by_browsers(server):
    status, headers, raw = server.request("GET", "/")
    assert (status, headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert raw == (FOLDER / "index.html").read_bytes()
    assert "default-src 'none'; script-src 'self'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert server.request("GET", "/", headers={"if-none-match": headers["etag"]})[::2] == (304, b"")
    n_sent = 0
    for file in FOLDER.iterdir():
        if file.suffix in TYPES and file.name != "index.html":
            status, headers, raw = server.request("GET", f"/page/{file.name}", headers={"accept-encoding": "gzip"})
            assert (status, headers["content-encoding"]) == (200, "gzip")
            assert gzip.decompress(raw) == file.read_bytes()
            n_sent += len(raw)
    assert n_sent < 32_000
    assert server.request("GET", "/page/__init__.py")[0] == 404


def test_the_page_is_part_of_the_package():
    packed = re.search(r'"edgellm.server.page" = (\[.*\])', (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {f"*{suffix}" for suffix in TYPES} == set(json.loads(packed[1]))
    assert {file.suffix for file in FOLDER.iterdir() if file.is_file()} == {*TYPES, ".py"}


def test_no_page():
    with Server("stories260k", "--no-page") as server:
        assert server.request("GET", "/")[0] == server.request("GET", "/page/app.js")[0] == 404
        assert server.get("/health")[0] == 200


# Conversations.


def test_an_answer_comes_piece_by_piece(visit):
    page = visit({"sampling": {"temperature": 0, "max_tokens": 200}})
    page.evaluate("""() => {
        window.lengths = new Set();
        new MutationObserver(() => lengths.add(document.querySelector(".said > .body")?.textContent.length))
            .observe(document.getElementById("thread"), { subtree: true, childList: true, characterData: true });
    }""")
    sent(page, "Write a long story about a lighthouse and its keeper.")
    assert page.evaluate("lengths.size") > 5


def test_an_answer_is_kept(page, server, name):
    page.get_by_label("Message", exact=True).fill(FRANCE)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Briefly.")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status").first).to_have_text("Answering")
    text = whole(page)
    assert "Paris" in text
    expect(page.locator("#status")).to_have_text(f"Answer: {text}")
    assert page.locator(".user .text").inner_text() == f"{FRANCE}\nBriefly."
    expect(page.locator(".assistant .facts")).to_have_text(re.compile(rf"{name} · \d+ tokens · \d+(\.\d)? tokens/s"))
    expect(page.locator("#used")).to_have_text(re.compile(r"\d+ of 8,192"))
    page.reload()
    assert whole(page) == text
    expect(page.get_by_role("heading", level=1)).to_have_text(FRANCE)
    expect(page.locator("#conversations .open")).to_have_text([FRANCE])
    body = {"model": name, "messages": [{"role": "user", "content": f"{FRANCE}\nBriefly."}], **GREEDY["sampling"]}
    assert server.post("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"] == text


def test_stop_go_on_and_answer_again(visit, server):
    page = visit({"sampling": {"temperature": 0, "max_tokens": 400}})
    send(page, "Write a long story about a lighthouse and its keeper.")
    expect(page.locator(".said > .body")).to_have_text(re.compile("...."))
    page.keyboard.press("Escape")
    stopped = whole(page)
    expect(page.locator(".ending")).to_contain_text("Stopped.")
    until(lambda: server.metric("edgellm_answers") == 0)
    page.get_by_role("button", name="Go on").click()
    expect(page.locator(".running .said > .body")).to_have_text(re.compile(re.escape(stopped.split("\n")[0])))
    page.wait_for_function("n => document.querySelector('.said > .body').innerText.length > n", arg=len(stopped))
    page.get_by_role("button", name="Stop").click()
    more = whole(page)
    assert more.startswith(stopped)
    page.get_by_label("Answer again").click()
    expect(page.locator(".said > .body")).not_to_have_text(more)
    page.get_by_role("button", name="Stop").click()
    expect(page.locator(".versions")).to_have_text("2/2")
    page.get_by_label("The one before").click()
    assert whole(page) == more


def test_edit(page):
    first = sent(page, FRANCE)
    page.locator(".user").get_by_label("Edit").click()
    page.get_by_label("Text", exact=True).fill("Name the capital of Italy.")
    page.locator(".editing").get_by_role("button", name="Send").click()
    expect(page.locator(".user .versions")).to_have_text("2/2")
    assert "Rome" in whole(page)
    page.locator(".user").get_by_label("The one before").click()
    assert whole(page) == first
    page.locator(".assistant").get_by_label("Edit").click()
    page.get_by_label("Text", exact=True).fill("The capital of")
    page.get_by_role("button", name="Keep").click()
    page.get_by_role("button", name="Go on").click()
    assert re.match(r"The capital of France is", whole(page))


def test_another_model_and_settings(page, name):
    page.get_by_role("button", name="Settings", exact=True).click()
    page.get_by_label("System prompt").fill("You only say Moo.")
    page.get_by_label("Tokens at most").fill("5")
    page.get_by_label("Temperature").first.fill("0.5")
    page.keyboard.press("Tab")
    page.keyboard.press("Escape")
    with page.expect_request("**/v1/chat/completions") as chat:
        sent(page, "Hello")
    asked = chat.value.post_data_json
    assert asked["messages"][0] == {"role": "system", "content": "You only say Moo."}
    assert (asked["max_tokens"], asked["temperature"], asked["model"]) == (5, 0.5, name)
    page.get_by_label("Model", exact=True).select_option("stories260k")
    page.get_by_role("button", name="New conversation").click()
    expect(page.get_by_role("heading", name="Write with stories260k")).to_be_visible()
    with page.expect_request("**/v1/completions") as completion:
        sent(page, "Once upon a time")
    assert completion.value.post_data_json["prompt"] == "Once upon a time"
    expect(page.locator(".assistant .facts")).to_contain_text("stories260k · 5 tokens")
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_have_value("stories260k")


def test_the_list_of_conversations(page, tmp_path):
    sent(page, FRANCE)
    page.get_by_role("button", name="New conversation").click()
    sent(page, "Hello")
    titles = page.locator("#conversations .open")
    expect(titles).to_have_text(["Hello", FRANCE])
    page.get_by_label("More of Hello").click()
    page.get_by_role("menuitem", name="Rename").click()
    page.get_by_label("Title").fill("Greetings")
    page.keyboard.press("Enter")
    expect(titles).to_have_text(["Greetings", FRANCE])
    with page.expect_download() as download:
        page.get_by_role("button", name="Export all").click()
    file = tmp_path / "conversations.json"
    download.value.save_as(file)
    titles.last.click()
    expect(page.get_by_role("heading", level=1)).to_have_text(FRANCE)
    for title in (FRANCE, "Greetings"):
        page.get_by_label(f"More of {title}").click()
        page.get_by_role("menuitem", name="Delete").click()
        expect(page.get_by_label(f"More of {title}")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(titles).to_have_text(["Greetings"])
    page.locator("#file").set_input_files(file)
    expect(titles).to_have_count(3)
    expect(page.locator("#toast")).to_have_text("2 conversations are imported.")
    broken = json.loads(file.read_text())
    broken["conversations"][0]["messages"] = {"a": {"id": "a", "parent": "a", "role": "user", "text": "x"}}
    file.write_text(json.dumps(broken))
    page.locator("#file").set_input_files(file)
    expect(page.locator("#toast")).to_contain_text("is not imported: the messages")
    expect(titles).to_have_count(3)


# Tokens.


def test_tokens_and_what_could_have_stood_there(page):
    page.get_by_role("button", name="Probabilities").click()
    text = sent(page, FRANCE)
    page.get_by_label("Probabilities of its tokens").click()
    tokens = page.locator(".token")
    assert "".join(tokens.all_inner_texts()).replace("↵", "") == text
    paris = tokens.filter(has_text="Paris").first
    at = int(paris.get_attribute("data-i"))
    tokens.first.focus()
    for _ in range(at):
        page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    rows = page.locator("#token li")
    expect(rows).to_have_count(8)
    shown = [float(row.split("\n")[-1].strip("<% ")) for row in rows.all_inner_texts()]
    assert shown[0] > 50
    assert shown == sorted(shown, reverse=True)
    assert sum(shown) < 100.5
    expect(rows.first.get_by_role("button")).to_have_attribute("aria-label", re.compile(r"·Paris, .*as written"))
    other = rows.nth(1).locator("code").inner_text().replace("·", " ")
    rows.nth(1).get_by_role("button").click()
    expect(page.locator(".assistant .versions")).to_have_text("2/2")
    before = "".join(tokens.all_inner_texts()) or text
    assert whole(page).startswith(before[: before.index(" Paris")] + other)


def scored(text, *others, **delta):
    """A token as a stream tells it, with bytes where it is half a character."""
    raw = text if isinstance(text, bytes) else text.encode()
    top = [{"token": each, "logprob": -1 - i, "bytes": list(each.encode())} for i, each in enumerate(others)]
    token = {"token": raw.decode(errors="replace"), "logprob": -0.5, "bytes": list(raw), "top_logprobs": top}
    return {"choices": [{"delta": delta, "logprobs": {"content": [token]}, "finish_reason": None}]}


def test_another_token_within_thoughts_and_characters(page):
    half, rest = "é".encode()[:1], "é".encode()[1:]
    stream(
        page, scored("<think>"), scored("Hmm", "Well", "So", reasoning_content="Hmm"), scored("</think>"),
        scored("Ol", content="Ol"), scored(half, "e"), scored(rest, "a", content="é"),
    )  # fmt: skip
    page.get_by_role("button", name="Probabilities").click()
    assert sent(page, "Hello") == "Olé"
    page.get_by_label("Probabilities of its tokens").click()
    tokens = page.locator(".token")
    expect(tokens).to_have_text(["<think>", "Hmm", "</think>", "Ol", "\\xc3", "\\xa9"])
    tokens.last.click()
    expect(page.locator("#token button").first).to_be_disabled()  # half a character and an a
    page.keyboard.press("Escape")
    told = []
    for at, other in ((4, "e"), (1, "Well")):
        if told:
            page.get_by_label("The one before").click()
            page.get_by_label("Probabilities of its tokens").click()
        tokens.nth(at).click()
        with page.expect_request("**/v1/chat/completions") as request:
            page.locator("#token button").filter(has_text=other).click()
        whole(page)
        told.append(request.value.post_data_json)
    assert all(each["continue_final_message"] for each in told)
    assert [each["messages"][-1] for each in told] == [
        {"role": "assistant", "content": "Ole", "reasoning_content": "Hmm"},
        {"role": "assistant", "content": "", "reasoning_content": "Well"},
    ]


# What goes wrong.


def test_a_lost_connection_leaves_what_has_come(page):
    stream(page, delta(content="The capital of"), ends=False)
    assert sent(page, FRANCE) == "The capital of"
    expect(page.locator(".ending")).to_contain_text("the connection ended before the answer did")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Go on").click()
    expect(page.locator(".ending")).to_have_count(0)
    assert whole(page).startswith("The capital of France is")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    send(page, "And of Italy?")
    expect(page.locator(".ending")).to_contain_text("the server cannot be reached")
    page.unroute("**/v1/chat/completions")
    page.get_by_role("button", name="Try again").click()
    assert "Italy" in whole(page)


def test_errors_are_shown_in_full(page, server, name):
    text = "word " * 9000
    body = {"model": name, "messages": [{"role": "user", "content": text.strip()}], **GREEDY["sampling"]}
    refused = server.post("/v1/chat/completions", body)[1]["error"]
    page.get_by_label("Message", exact=True).fill(text.strip())
    page.keyboard.press("Enter")
    expect(page.locator(".error")).to_contain_text(refused["message"])
    expect(page.locator(".error")).to_contain_text("400 · invalid_request_error · code context_length_exceeded")


def test_a_server_that_asks_for_a_key(visit):
    with Server("stories260k", "--api-key", "sesame") as server:
        assert server.request("GET", "/v1/models")[0] == 401
        page = visit(at=server)
        key = page.locator("#key")
        key.fill("wrong")
        key.press("Enter")
        expect(page.locator("#locked-why")).to_contain_text("the key is missing or wrong")
        key.fill("sesame")
        key.press("Enter")
        expect(page.locator("#locked")).to_be_hidden()
        assert sent(page, "Once upon a time")
        page.reload()
        expect(page.get_by_label("Model", exact=True)).to_have_value("stories260k")


ATTACK = """<img src=x onerror="hacked = 1"><script>hacked = 2</script>

[a](javascript:hacked=3) ![b](javascript:hacked=4) [c](data:text/html,x) <javascript:hacked=5> [d](JaVaScRiPt:hacked=6)

| <svg onload=hacked=7> | x |
|---|---|
| `<b>` | <iframe src="https://example.com"> |

```"><script>hacked=8</script>
<script>hacked = 9</script>
```

![pixel](https://example.com/pixel.png) [fine](https://example.com/?a=1&b=2)"""


def test_what_a_model_writes_is_text(page):
    stream(page, delta(reasoning_content=ATTACK), delta(content=ATTACK))
    send(page, ATTACK)
    text = whole(page)
    page.get_by_text("Thoughts").click()
    assert "<img src=x onerror" in text
    assert "[a](javascript:hacked=3)" in text
    assert page.evaluate("typeof hacked") == "undefined"
    thread = page.locator("#thread")
    assert thread.locator("img, script, iframe, b, object, embed, style").count() == 0
    links = {each.get_attribute("href") for each in thread.locator("a").all()}
    assert links == {"https://example.com", "https://example.com/pixel.png", "https://example.com/?a=1&b=2"}
    assert {each.get_attribute("rel") for each in thread.locator("a").all()} == {"noopener noreferrer"}
    assert page.evaluate("[...document.querySelectorAll('#thread *')].every(e => ![...e.attributes].some("
                         "a => a.name.startsWith('on')))")  # fmt: skip


def test_thoughts_are_folded(page):
    stream(page, delta(reasoning_content="Hmm, *well*."), delta(content="Paris."))
    assert sent(page, FRANCE) == "Paris."
    details = page.locator(".thought")
    assert details.get_attribute("open") is None
    page.get_by_text("Thoughts").click()
    expect(details.locator("em")).to_have_text("well")


# Markdown.

MARKDOWN = {
    "a *b* **c** ***d*** ~~e~~ `f*g*`": "<p>a <em>b</em> <strong>c</strong> <em><strong>d</strong></em> <s>e</s> "
    "<code>f*g*</code></p>",
    "2 * 3 * 4, snake_case_name, a_b_": "<p>2 * 3 * 4, snake_case_name, a_b_</p>",
    "**open and `code": "<p>**open and `code</p>",
    "# T\n\ntext\nline": '<h3 class="level1">T</h3><p>text<br>line</p>',
    "- a\n- b\n  - c\n\n1. x\n2. y": "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>x</li><li>y</li></ol>",
    "3. a\n\n   b\n4. c": '<ol start="3"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol>',
    "- [x] done\n- [ ] not": '<ul><li class="task"><input type="checkbox" disabled="" checked="">done</li>'
    '<li class="task"><input type="checkbox" disabled="">not</li></ul>',
    "> a\n> - b\n\n---": "<blockquote><p>a</p><ul><li>b</li></ul></blockquote><hr>",
    "|a|b|\n|-|-:|\n|1|x\\|y|": '<div class="table" tabindex="0"><table><thead><tr><th>a</th>'
    '<th class="right">b</th></tr>'
    '</thead><tbody><tr><td>1</td><td class="right">x|y</td></tr></tbody></table></div>',
    "[a*b*](https://x.y/(z) \"t\") <https://x.y> https://x.y/z. [n](/etc)":
    '<p><a href="https://x.y/(z)" target="_blank" rel="noopener noreferrer">a<em>b</em></a> '
    '<a href="https://x.y" target="_blank" rel="noopener noreferrer">https://x.y</a> '
    '<a href="https://x.y/z" target="_blank" rel="noopener noreferrer">https://x.y/z</a>. [n](/etc)</p>',
    "<b>&amp;\\*a\\* \\(x\\)<br>c": "<p>&lt;b&gt;&amp;*a* \\(x\\)<br>c</p>",
    "a\n```js\nlet *a*\n\n  <b>\n": '<p>a</p><figure class="code"><figcaption><span>js</span></figcaption>'
    '<pre tabindex="0">'
    "<code>let *a*\n\n  &lt;b&gt;\n</code></pre></figure>",
}  # fmt: skip


def test_markdown(page):
    show = """async (text) => {
        const { show } = await import("/page/markdown.js");
        const into = document.createElement("div");
        for (let i = 1; i < text.length; i++) show(into, text.slice(0, i));
        show(into, text);
        const grown = into.innerHTML;
        into.replaceChildren();
        show(into, text);
        if (into.innerHTML !== grown) throw new Error(`${grown} is not ${into.innerHTML}`);
        into.querySelectorAll("button").forEach((button) => button.remove());
        return into.innerHTML;
    }"""
    assert {text: page.evaluate(show, text) for text in MARKDOWN} == MARKDOWN


HOSTILE = ["*a " * 20000, "[" * 20000, "`" * 3 + "``" * 20000, "> " * 5000, "- " * 5000, "*" * 20000 + "a", "|" * 20000,
           "[a](" * 10000, "a**b" * 10000, "<" * 20000, "\\" * 20001, "https://" * 5000, "_a*" * 10000]  # fmt: skip


def test_text_that_was_made_to_be_slow_is_not(page):
    show = """async (text) => {
        const { show } = await import("/page/markdown.js");
        const into = document.createElement("div");
        show(into, text);
        return into.innerHTML.length;
    }"""
    page.set_default_timeout(5_000)
    for text in HOSTILE:
        assert page.evaluate(show, text) > 0


# As it is seen, and heard.


def test_dark_and_light(visit):
    page = visit(color_scheme="dark")
    color = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(color)
    page.get_by_role("button", name="Light").click()
    light = page.evaluate(color)
    assert light != dark
    page.reload()
    assert page.evaluate(color) == light
    page.get_by_role("button", name="Dark").click()
    assert page.evaluate(color) == dark
    assert visit(color_scheme="light").evaluate(color) == light


def test_on_a_phone(visit):
    page = visit(viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    field = page.get_by_label("Message", exact=True)
    field.fill("Hello")
    field.press("Enter")  # makes a new line, as there is no Shift
    assert field.input_value() == "Hello\n"
    page.get_by_role("button", name="Send").click()
    whole(page)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    expect(page.locator("#drawer")).not_to_be_in_viewport()
    page.get_by_role("button", name="Conversations", exact=True).click()
    expect(page.locator("#conversations .open")).to_be_in_viewport()
    page.keyboard.press("Escape")
    expect(page.locator("#drawer")).not_to_be_in_viewport()
    expect(page.get_by_role("button", name="Conversations", exact=True)).to_be_focused()


def test_everything_has_a_name(page):
    sent(page, FRANCE)
    page.get_by_role("button", name="Settings", exact=True).click()
    unnamed = page.evaluate("""() => [...document.querySelectorAll("button, input, textarea, select, meter")]
        .filter((e) => !(e.ariaLabel || e.textContent.trim() || e.labels?.length))
        .map((e) => e.outerHTML)""")
    assert unnamed == []
    assert page.locator("html").get_attribute("lang") == "en"
    expect(page.get_by_label("Close settings")).to_be_visible()
