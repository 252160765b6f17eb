(file) => {
  // Gives the visitor the file that is in a hidden place.
  if (!file) return;
  const link = document.createElement("a");
  [link.href, link.download] = [file.url, file.orig_name];
  link.click();
}
