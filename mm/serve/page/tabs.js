// The two tabs: arrow keys, Home and End move between them, as the ARIA practices say.

import { byId } from "./dom.js";

export class Tabs {
  /** `opened`: {id of a tab: what to do when it comes to the front}. */
  constructor(opened) {
    this.opened = opened;
    this.tabs = [...document.querySelectorAll("[role=tab]")];
    for (const tab of this.tabs) {
      tab.addEventListener("click", () => this.select(tab.id));
      tab.addEventListener("keydown", (event) => this.move(event, this.tabs.indexOf(tab)));
    }
  }

  move(event, at) {
    const last = this.tabs.length - 1;
    const to = { ArrowRight: at === last ? 0 : at + 1, ArrowLeft: at === 0 ? last : at - 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.tabs[to].focus();
    this.select(this.tabs[to].id);
  }

  /** Brings a tab to the front; `then` in the place of what it does when it is opened by hand. */
  select(id, then = this.opened[id]) {
    for (const tab of this.tabs) {
      const chosen = tab.id === id;
      tab.setAttribute("aria-selected", String(chosen));
      tab.tabIndex = chosen ? 0 : -1;
      byId(tab.getAttribute("aria-controls")).hidden = !chosen;
    }
    then?.();
  }
}
