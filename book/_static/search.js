// Results show an excerpt where the book is served; a page that was opened from disk cannot fetch one.
DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = location.protocol.startsWith("http");
// An excerpt is of the text alone: without buttons, contents, and the signs around formulas.
document.addEventListener("DOMContentLoaded", () => {
  const textOf = Search.htmlToText;
  Search.htmlToText = (page, anchor) => {
    const article = new DOMParser().parseFromString(page, "text/html").querySelector("article");
    return textOf(`<div role="main">${article?.outerHTML ?? ""}</div>`, anchor).replace(/\\[()[\]]/g, "");
  };
});
