"use strict";
/* Conversations live in this browser's local storage and nowhere else. A conversation: {id, title, messages}. */
window.raylmChat = (() => {
  const KEY = "raylm-chat:" + location.pathname;
  const THEME = "raylm-chat-theme";
  const MAX_CONVERSATIONS = 100;
  let current = null;

  /* Whatever a proxy in front of the server calls this page, its own address is right. */
  if (window.gradio_config) window.gradio_config.root = location.origin + location.pathname.replace(/\/+$/, "");

  function read() {
    try {
      const found = JSON.parse(localStorage.getItem(KEY));
      return Array.isArray(found) ? found : [];
    } catch {
      return [];
    }
  }

  /* Drops the oldest while there is no room. */
  function write(conversations) {
    for (let kept = conversations.slice(0, MAX_CONVERSATIONS); ; kept.pop()) {
      try {
        localStorage.setItem(KEY, JSON.stringify(kept));
        return;
      } catch {
        if (kept.length <= 1) return;
      }
    }
  }

  function textOf(message) {
    if (typeof message.content === "string") return message.content;
    return (message.content || []).map((part) => part.text || "").join("");
  }

  function titleOf(messages) {
    const first = messages.find((message) => message.role === "user");
    const text = first ? textOf(first).replace(/\s+/g, " ").trim() : "";
    return text.length > 42 ? text.slice(0, 40) + "…" : text || "Conversation";
  }

  /* What the list and the button under it become. */
  function list() {
    const choices = read().map(({ id, title }) => [title, id]);
    const visible = choices.length > 0;
    return [
      { __type__: "update", choices, value: current, visible },
      { __type__: "update", visible },
    ];
  }

  function applyTheme() {
    const chosen = localStorage.getItem(THEME);
    if (chosen) document.body.classList.toggle("dark", chosen === "dark");
  }

  return {
    start() {
      applyTheme();
      if (window.innerWidth < 768) document.querySelector("#history.open .toggle-button")?.click();
      return list();
    },
    /* After an answer: the conversation on screen goes to the top of the list. */
    save(messages) {
      if (messages && messages.length) {
        current = current || Date.now().toString(36) + Math.random().toString(36).slice(2, 8);
        const others = read().filter(({ id }) => id !== current);
        const kept = messages.map(({ role, content, metadata }) => ({ role, content, metadata, options: null }));
        write([{ id: current, title: titleOf(messages), messages: kept }, ...others]);
      }
      return list();
    },
    open(id, messages) {
      this.save(messages);
      const found = read().find((conversation) => conversation.id === id);
      current = found ? id : null;
      return [found ? found.messages : [], ""];
    },
    /* An answer that is still coming ends here, so what there is of it is kept first. */
    fresh(messages) {
      this.save(messages);
      current = null;
      return [...list(), [], ""];
    },
    remove() {
      write(read().filter(({ id }) => id !== current));
      return this.fresh(null);
    },
    removeAll() {
      if (confirm("Delete all conversations in this browser?")) {
        write([]);
        return this.fresh(null);
      }
      return undefined;
    },
    /* The message field between answers. */
    idle() {
      return { __type__: "update", submit_btn: true, stop_btn: false };
    },
    toggleSettings() {
      document.querySelector("#settings .toggle-button, .sidebar.right .toggle-button")?.click();
    },
    toggleTheme() {
      const dark = !document.body.classList.contains("dark");
      localStorage.setItem(THEME, dark ? "dark" : "light");
      applyTheme();
    },
  };
})();
