// Behaviour of the pages beyond htmx. Progressive enhancement: every page works without it.
"use strict";
(() => {
  const $ = (selector) => document.querySelector(selector);
  const on = (type, handler) => document.addEventListener(type, handler);
  const within = (event, selector) => event.target instanceof Element && event.target.closest(selector);

  // A poll's response must not undo what somebody is doing: typed text and open details are preserved, and so is the
  // class that marks a request under way.
  Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, node) =>
    !(name === "value" && node.matches("textarea, input:not([type=hidden])")) &&
    !(name === "open" && node.matches("details, dialog")) &&
    !(name === "class" && node.matches(".htmx-request"));
  // An answer that streams in is newer than the poll's response.
  Idiomorph.defaults.callbacks.beforeNodeMorphed = (old, now) => !(old.matches?.("[data-keep]") && old.id === now.id);

  // idiomorph 0.8.0 treats every swap that is not its own as one that replaces the element: out-of-band "beforeend" swaps
  // then inserted the wrapping element too, and were repeated for each of these.
  htmx.defineExtension("morph", {
    isInlineSwap: (style) => style === "morph" || style === "morph:outerHTML",
    handleSwap: (style, target, { children }) => /^morph(:|$)/.test(style) &&
      Idiomorph.morph(target, children, { morphStyle: style === "morph:innerHTML" ? "innerHTML" : "outerHTML" }),
  });

  // EventSource for htmx that closes its connection while the tab is hidden and reopens it when shown. A browser has six
  // connections to a host for all of its tabs: the seventh tab with a stream hung.
  class TabStream extends EventTarget {
    #url; #source = null; #types = new Set(); #ended = false;
    constructor(url) {
      super();
      this.#url = url;
      on("visibilitychange", this.#turn);
      this.#turn();
    }
    get readyState() { return this.#ended ? EventSource.CLOSED : this.#source?.readyState ?? EventSource.CONNECTING; }
    addEventListener(type, handler) {
      super.addEventListener(type, handler);
      if (this.#types.has(type)) return;
      this.#types.add(type);
      this.#source?.addEventListener(type, this.#pass);
    }
    close() {
      this.#ended = true;
      document.removeEventListener("visibilitychange", this.#turn);
      this.#source?.close();
    }
    #pass = ({ type, data }) => this.dispatchEvent(new MessageEvent(type, { data }));
    #turn = () => {
      if (document.hidden) {
        this.#source?.close();
        this.#source = null;
      } else if (!this.#source) {
        this.#source = new EventSource(this.#url);
        this.#source.onopen = (event) => this.onopen?.(event);
        this.#source.onerror = (event) => {
          if (event.target.readyState === EventSource.CLOSED) this.close(); // htmx creates a new one
          this.onerror?.(event);
        };
        for (const type of this.#types) this.#source.addEventListener(type, this.#pass);
      }
    };
  }
  htmx.createEventSource = (url) => new TabStream(url);

  // A form that a poll has morphed posts to its new address; htmx itself notices the new attribute only later.
  on("htmx:configRequest", ({ detail }) => { detail.path = detail.elt.getAttribute("hx-post") ?? detail.path; });

  // Polling: not in a hidden tab, at once in one that is shown again. The dialog of the providers polls while it is open.
  const poll = () => document.querySelectorAll("#poll, #providers-poll").forEach((it) => htmx.trigger(it, "refresh"));
  // A refresh requested during a poll is done after it, because that poll may have begun before the change.
  let polling = false;
  let again = false;
  on("htmx:beforeRequest", (event) => {
    if (!event.detail.elt.matches("#poll, #providers-poll")) return;
    if (document.hidden) event.preventDefault();
    else if (event.detail.elt.id === "poll") polling = true;
  });
  const polled = ({ detail }) => {
    if (detail.elt.id !== "poll") return;
    polling = false;
    if (again) { again = false; poll(); }
  };
  on("htmx:afterProcessNode", polled); // the response contained a new #poll, which is active from here on
  on("htmx:afterRequest", polled); // it contained none; this event does not reach a replaced element
  for (const type of ["refresh", "htmx:sseClose"]) { // in the capture phase: before htmx sends the request
    document.addEventListener(type, () => { again = polling; }, true);
  }
  on("visibilitychange", () => document.hidden || poll());

  // Other tabs show a change made here at once.
  const tabs = new BroadcastChannel("switchyard");
  tabs.onmessage = poll;
  on("htmx:afterRequest", ({ detail }) => {
    if (detail.requestConfig?.verb === "post") tabs.postMessage("poll");
  });

  // A proxy may answer in Switchyard's place. Its error page is not shown as ours.
  const foreign = (xhr) => xhr.status >= 400 && !xhr.getResponseHeader("Switchyard-Error");
  // What is reported about an action in the dialog of the providers is shown there, because it covers the page.
  const notice = (it) => (it?.closest("#providers-dialog") && $("#providers-notice")) ?? $("#notice");
  on("htmx:beforeSwap", ({ detail }) => {
    if (detail.target?.id === "notice") detail.target = notice(detail.requestConfig?.elt);
  });
  const instead = ({ status }) =>
    !status ? "Switchyard could not be reached."
    : status === 413 ? "It is larger than something between this page and Switchyard takes (413)."
    : `Something between this page and Switchyard answered in its place (${status}).`;
  on("htmx:beforeSwap", ({ detail }) => {
    if (!foreign(detail.xhr)) return;
    detail.shouldSwap = false;
    if (detail.requestConfig.verb !== "post" || detail.requestConfig.elt.id === "composer-form") return;
    const strip = notice(detail.requestConfig.elt).appendChild(document.createElement("div"));
    strip.className = "strip failed";
    strip.append(`That was not done. ${instead(detail.xhr)} Try again.`);
  });

  // An unreachable server is reported once, until the next response.
  on("htmx:sendError", () => { $("#offline").hidden = false; });
  on("htmx:afterOnLoad", ({ detail }) => { $("#offline").hidden = !foreign(detail.xhr); });

  // Screen readers read state changes from a live region that is never swapped, each line when it first appears.
  const lines = () => $("#poll")?.dataset.announce.split("\n") ?? [];
  let said = lines();
  on("htmx:afterRequest", () => {
    const now = lines();
    const news = now.filter((line) => !said.includes(line));
    if (news.length) $("#announcer").textContent = news.join(" ");
    said = now;
  });

  // The notice about the last action disappears when the next one begins.
  on("htmx:beforeRequest", ({ detail }) => {
    if (detail.requestConfig.verb === "post") notice(detail.requestConfig.elt).replaceChildren();
  });

  // Menus and dialogs close once the request of the chosen action was sent.
  on("htmx:afterRequest", ({ detail }) => {
    if (detail.requestConfig?.verb !== "post") return;
    detail.elt.closest("[popover]")?.hidePopover();
    detail.elt.closest("#dialog")?.close();
  });
  on("htmx:afterSwap", ({ detail }) => {
    if (detail.target?.matches("dialog:not([open])")) detail.target.showModal();
  });

  // The providers open over any page but their own.
  $("#providers-dialog").addEventListener("close", ({ target }) => target.replaceChildren()); // which ends its polling
  on("htmx:beforeRequest", (event) => {
    if (event.detail.elt.id !== "providers-button" || !$("main #providers-form")) return;
    event.preventDefault();
    $("#main").focus();
  });

  // The composer: Enter sends, Shift+Enter breaks the line, Esc stops. A draft survives reloads, refusals, and a
  // conversation deleted in another tab: only text that is known to be stored is removed from it.
  const text = $("#text");
  const form = text?.form;
  const unsent = $("#composer-error");
  const draft = `draft ${form?.dataset.draft}`;
  const remember = () => text.value ? sessionStorage.setItem(draft, text.value) : sessionStorage.removeItem(draft);
  let sending = {}; // the text last sent, its id, and whether it was stored
  if (text) {
    text.value ||= sessionStorage.getItem(draft) ?? "";
    text.addEventListener("input", remember);
    text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      const send = $("#send");
      if (send && !send.disabled && text.value.trim()) form.requestSubmit(send);
    });
    form.addEventListener("htmx:configRequest", ({ detail }) => {
      unsent.replaceChildren();
      // The same text keeps its id, so that the server stores it once even if the first response was lost.
      const id = sending.text === text.value && !sending.arrived ? sending.id : detail.parameters.id;
      sending = { text: text.value, id, arrived: false };
      detail.parameters.id = id;
    });
    form.addEventListener("message-sent", () => {
      sending.arrived = true;
      if (text.value.startsWith(sending.text)) text.value = text.value.slice(sending.text.length); // more may be typed
      remember();
      stay = true;
      text.focus();
    });
    form.addEventListener("htmx:afterRequest", ({ detail }) => {
      if (sending.arrived || unsent.hasChildNodes()) return;
      const strong = unsent.appendChild(document.createElement("strong"));
      strong.textContent = "Not sent.";
      unsent.append(` ${instead(detail.xhr)} What you wrote is still here: send it again.`);
    });
  }
  on("keydown", (event) => {
    if (event.key === "Escape" && !$(":popover-open, dialog[open]")) $("#stop")?.click();
  });

  // The newest message stays in view, unless the reader has scrolled up.
  const messages = $("#messages");
  let stay = true;
  if (messages) {
    const follow = () => { if (stay) messages.scrollTop = messages.scrollHeight; };
    messages.addEventListener("scroll", () => {
      stay = messages.scrollHeight - messages.scrollTop - messages.clientHeight < 40;
    });
    new MutationObserver(follow).observe(messages, { childList: true, subtree: true, characterData: true });
    new ResizeObserver(follow).observe(messages);
    follow();
    // Earlier messages are inserted above; what is being read keeps its position.
    let fromEnd = null;
    on("htmx:beforeSwap", ({ detail }) => {
      if (detail.requestConfig?.elt.id !== "earlier-messages") return;
      stay = false;
      fromEnd = messages.scrollHeight - messages.scrollTop;
    });
    on("htmx:afterSettle", () => {
      if (fromEnd !== null) messages.scrollTop = messages.scrollHeight - fromEnd;
      fromEnd = null;
    });
  }

  // The model menu: arrow keys move, typing filters it.
  on("keydown", (event) => {
    const list = $("#model-menu:popover-open [data-arrows]");
    const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!list || !step) return;
    event.preventDefault();
    const buttons = [...list.querySelectorAll("li:not([hidden]) button")];
    const at = buttons.indexOf(document.activeElement);
    buttons[at < 0 ? (step > 0 ? 0 : buttons.length - 1) : Math.max(0, Math.min(buttons.length - 1, at + step))]?.focus();
  });
  const narrow = () => {
    const field = $("[data-filter]");
    if (!field) return;
    const wanted = field.value.trim().toLowerCase();
    for (const item of document.querySelectorAll(field.dataset.filter)) {
      item.hidden = !item.querySelector(".name").textContent.toLowerCase().includes(wanted);
    }
  };
  on("input", (event) => within(event, "[data-filter]") && narrow());
  on("htmx:afterRequest", narrow);
  document.addEventListener("toggle", (event) => { // reset the filter when the menu opens
    const field = event.newState === "open" && event.target.querySelector("[data-filter]");
    if (field) { field.value = ""; narrow(); field.focus(); } // not autofocus: htmx would focus it at every poll
  }, true);

  // Copy buttons, and dismissing what only the script can have shown.
  const copy = async (button) => {
    const code = button.closest(".code").querySelector("code");
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch { // navigator.clipboard exists on secure origins only
      getSelection().selectAllChildren(code);
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  on("click", (event) => {
    const button = within(event, "[data-copy]");
    if (button) copy(button);
    const clear = within(event, "[data-clear]");
    if (clear) notice(clear).replaceChildren();
  });

  // Tooltip for the hovered or focused segment of a memory bar.
  const tip = $("#tip");
  const show = (event) => {
    const part = within(event, "[data-tip]");
    if (!part) { tip.hidePopover(); return; }
    tip.textContent = part.dataset.tip;
    tip.showPopover();
    const { left, top, width } = part.getBoundingClientRect();
    const start = Math.min(left + width / 2 - tip.offsetWidth / 2, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, start)}px`;
    tip.style.top = `${top - tip.offsetHeight - 6}px`;
  };
  on("mouseover", show);
  on("focusin", show);
})();
