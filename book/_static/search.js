// Results show an excerpt where the book is served; a page that was opened from disk cannot fetch one.
DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = location.protocol.startsWith("http");
