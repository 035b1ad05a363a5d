// Before anything is painted: the light or dark that was chosen.
{
  const chosen = localStorage.getItem("edgellm-theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
}
