"use strict";
// A link's token stands behind its #, so no server and no log has seen it; it is traded for a cookie at once.

const said = document.getElementById("said");

async function enter(token) {
  let answer;
  try {
    answer = await fetch("/api/enter", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token }),
    });
  } catch {
    said.textContent = "No connection. Try again.";
    return;
  }
  if (answer.ok) {
    location.replace(location.pathname);
  } else {
    said.textContent = "This is not the token. Check that you have all of it.";
  }
}

document.getElementById("gate").addEventListener("submit", (event) => {
  event.preventDefault();
  enter(document.getElementById("token").value.trim());
});

const given = location.hash.slice(1);
if (given) {
  history.replaceState(null, "", location.pathname);
  enter(given);
}
