// Runs before the first paint, so that a chosen theme or language never flashes. Not a module: those run later.
try {
  const saved = JSON.parse(localStorage.getItem("nanozhchat.settings") ?? "{}");
  if (saved.theme === "light" || saved.theme === "dark") document.documentElement.dataset.theme = saved.theme;
  if (saved.language === "en") document.documentElement.lang = "en";
} catch {
  // storage is blocked: the system's theme, Chinese
}
