// Runs before the first paint, so that a chosen theme does not flash. The rest of the settings waits for the page.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("mimoflash-settings"))?.theme ?? "system";
} catch {
  document.documentElement.dataset.theme = "system";
}
