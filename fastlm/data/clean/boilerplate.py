"""Lines that belong to the page or the print and not to the text: by what they say, and by how often they come."""

from __future__ import annotations

import functools
import re
from itertools import pairwise

from ..document import Document, Dropped
from .registry import Count, step

# Whole lines, in lower case without signs around them.
LINES = (
    "skip to content", "skip to main content", "jump to navigation", "back to top", "read more", "click here", "log in",
    "sign in", "sign up", "register", "search", "menu", "home", "share", "tweet", "subscribe", "print this page",
    "previous", "next", "previous page", "next page", "loading", "advertisement", "all rights reserved", "accept all",
    "accept cookies", "accept all cookies", "cookie settings", "manage cookies", "privacy policy", "terms of use",
    "terms of service", "terms and conditions", "leave a comment", "leave a reply", "table of contents", "site map",
    "follow us", "contact us", "about us",
    "首页", "上一页", "下一页", "上一篇", "下一篇", "返回顶部", "返回首页", "回到顶部", "登录", "注册", "搜索", "菜单",
    "分享", "分享到", "阅读更多", "查看更多", "点击查看", "加载中", "广告", "关于我们", "联系我们", "版权所有",
    "隐私政策", "使用条款", "服务条款", "免责声明", "网站地图", "相关阅读", "推荐阅读", "发表评论",
    "首頁", "上一頁", "下一頁", "返回頂部", "登入", "註冊", "搜尋", "選單", "閱讀更多", "查看更多", "關於我們",
    "聯絡我們", "版權所有", "隱私權政策", "使用條款", "服務條款", "網站地圖", "相關閱讀", "發表評論",
)  # fmt: skip
# Anywhere in a line of at most `max_length` characters.
PHRASES = (
    "uses cookies", "use cookies", "use of cookies", "cookie policy", "enable javascript", "all rights reserved",
    "your browser does not support", "subscribe to our newsletter", "sign up for our newsletter",
    "使用cookie", "使用 cookie", "版权所有", "版權所有", "未经许可", "未經許可", "请启用javascript",
    "扫码关注", "扫描二维码", "icp备", "公网安备",
)  # fmt: skip
_AROUND = " \t\r\u3000-\u2013\u2014\u2022\u00b7|\u00bb\u00ab<>\u203a\u2039*#[](){}:\uff1a.!\u3002\u2026\u25ba\u25b6"
_DIGITS = re.compile(r"\d+")
_LEAST_PAGE = 20  # lines: a speaker's name or a refrain comes again sooner


@step("empty")
def boilerplate(
    document: Document,
    *,
    lines: tuple[str, ...] = LINES,
    phrases: tuple[str, ...] = PHRASES,
    max_length: Count = 120,
    pages: Count = 5,
) -> Document | Dropped:
    """Remove lines of navigation, of notices about cookies and rights, and headers that come once a page.

    A line goes if it is one of `lines`, but for case and signs around it, or if it has at most `max_length` characters
    and holds one of `phrases`. A line that comes at least `pages` times at regular distances of 20 lines or more, but
    for the numbers in it, is a page's header: its first occurrence stays. 0 turns that off.
    """
    text = document.text
    lower = text.lower()
    known = _known(lines)
    present = [phrase for phrase in map(str.lower, phrases) if phrase in lower]
    parts = text.split("\n")
    kept = [part for part in parts if len(part) > max_length or not _is_listed(part.lower(), known, present)]
    if pages and len(kept) > pages * _LEAST_PAGE:
        headers = _headers(kept, pages, max_length)
        kept = [part for number, part in enumerate(kept) if number not in headers]
    if len(kept) == len(parts):
        return document
    result = "\n".join(kept)
    return document._replace(text=result) if result.strip() else Dropped("empty")


def _is_listed(line: str, known: frozenset[str], present: list[str]) -> bool:
    return line.strip(_AROUND) in known or any(map(line.__contains__, present))


@functools.lru_cache(maxsize=8)
def _known(lines: tuple[str, ...]) -> frozenset[str]:
    return frozenset(line.lower().strip(_AROUND) for line in lines) - {""}


def _headers(lines: list[str], pages: int, max_length: int) -> set[int]:
    """The numbers of lines that repeat a page's header, but for the first of each."""
    places: dict[str, list[int]] = {}
    for number, line in enumerate(lines):
        if len(line) <= max_length:
            places.setdefault(_DIGITS.sub("0", line.strip()), []).append(number)
    headers: set[int] = set()
    for line, numbers in places.items():
        if len(numbers) >= pages and any(map(str.isalpha, line)) and _is_regular(numbers):
            headers.update(numbers[1:])
    return headers


def _is_regular(numbers: list[int]) -> bool:
    gaps = sorted(b - a for a, b in pairwise(numbers))
    middle = gaps[len(gaps) // 2]
    return gaps[0] >= max(_LEAST_PAGE, middle // 2) and gaps[len(gaps) * 4 // 5 - 1] <= middle * 3 // 2
