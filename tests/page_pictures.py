"""Makes the pictures of docs/server.md and the README: python tests/page_pictures.py"""

from pathlib import Path

from playwright.sync_api import sync_playwright
from serving import Server
from test_page import ARGUMENTS, CHROMIUM, GREEDY, origin, sent

FOLDER = Path(__file__).parents[1] / "docs" / "page"
CODE = "Write a Python function that reverses a string."
OTHERS = ["Name the capital of France.", "Give me three ideas for a rainy Sunday."]
HAIKU = "Write a haiku about a small computer."
SKY = "Explain why the sky is blue, in two sentences."


def main():
    with Server("smollm2", "stories260k", "--slots", 4) as server, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)

        def visit(width, height, scale=1, **options):
            size = {"width": width, "height": height}
            context = browser.new_context(viewport=size, device_scale_factor=scale, **options)
            page = context.new_page()
            page.goto(origin(server))
            page.locator("#suggestions button").first.wait_for()
            page.get_by_label("Settings").first.click()
            page.get_by_label("Temperature").first.fill(str(GREEDY["sampling"]["temperature"]))
            page.keyboard.press("Tab")
            page.keyboard.press("Escape")
            return page

        def picture(page, name):
            page.wait_for_timeout(500)
            page.screenshot(path=FOLDER / f"{name}.png")

        page = visit(980, 620)
        for other in OTHERS:
            sent(page, other)
            page.get_by_role("button", name="New conversation").click()
        sent(page, CODE)
        picture(page, "desktop")

        page = visit(980, 560, color_scheme="dark")
        page.get_by_role("button", name="Probabilities").click()
        sent(page, SKY)
        page.get_by_label("Probabilities of its tokens").click()
        page.locator(".token").filter(has_text="light").first.click()
        picture(page, "dark")

        page = visit(390, 640, 1.25, has_touch=True, is_mobile=True)
        page.locator("#ask").fill(HAIKU)
        page.get_by_role("button", name="Send").click()
        page.get_by_label("Answer again").wait_for()
        picture(page, "phone")
        browser.close()


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    main()
