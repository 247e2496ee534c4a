// The page as a whole: asks the run for its status, or its user for a key, and shows the parts.

import * as api from "./api.js";
import { startChat } from "./chat.js";
import { byId, name, setText } from "./dom.js";
import { watch } from "./status.js";

const FIRST_WAIT_MILLISECONDS = 1000;
const MAX_WAIT_MILLISECONDS = 10_000;
const WIDE = "(min-width: 60rem)";

let opened = false;

function showView(view) {
  document.body.dataset.view = view;
  for (const id of ["connecting", "gate", "app"]) byId(id).hidden = id !== view;
}

/** Ask for a key; ``problem`` says what is wrong with the one before. */
function showGate(problem) {
  showView("gate");
  setText(byId("key-problem"), problem);
  byId("key").focus();
}

function onRefused(failure) {
  api.useKey("");
  showGate(failure.message);
}

/** Open the page for the key that it has, or for none. */
async function open() {
  let status = null;
  try {
    status = await api.status();
  } catch (failure) {
    if (failure.code !== "not_permitted") throw failure;
    setText(byId("model"), name(await api.modelName()) || "model");
  }
  byId("no-status").hidden = status !== null;
  byId("status").hidden = status === null;
  byId("forget").hidden = !api.hasKey();
  showView("app");
  if (status !== null) watch(status, onRefused);
  if (!opened) startChat(onRefused);
  opened = true;
  if (status === null) showTab("chat");
  if (status === null || matchMedia(WIDE).matches) byId("prompt").focus({ preventScroll: true });
}

async function connect(waitMilliseconds) {
  try {
    await open();
  } catch (failure) {
    if (failure.status === 401) {
      showGate("");
      return;
    }
    if (!(failure instanceof api.Failure)) throw failure;
    setText(byId("connecting-text"), failure.message);
    if (failure.status !== 403) {
      setTimeout(() => connect(Math.min(waitMilliseconds * 2, MAX_WAIT_MILLISECONDS)), waitMilliseconds);
    }
  }
}

async function enterKey() {
  const field = byId("key");
  const button = byId("key-form").querySelector("button");
  if (!field.value.trim()) return;
  api.useKey(field.value);
  field.value = "";
  setText(byId("key-problem"), "");
  button.disabled = true;
  try {
    await open();
  } catch (failure) {
    if (!(failure instanceof api.Failure)) throw failure;
    onRefused(failure);
  } finally {
    button.disabled = false;
  }
}

/** Choose what a narrow window shows; a wide one shows both. */
function showTab(tab) {
  document.body.dataset.tab = tab;
  for (const each of ["run", "chat"]) byId(`tab-${each}`).setAttribute("aria-pressed", String(each === tab));
}

byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  enterKey();
});
for (const tab of ["run", "chat"]) byId(`tab-${tab}`).addEventListener("click", () => showTab(tab));
byId("skip").addEventListener("click", (event) => {
  event.preventDefault();
  showTab("chat");
  byId("prompt").focus();
});
// All that the page knows is in its memory.
byId("forget").addEventListener("click", () => location.reload());
connect(FIRST_WAIT_MILLISECONDS);
