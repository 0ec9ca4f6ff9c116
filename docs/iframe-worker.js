// Browsers start no worker for a page that is opened as a file. On such pages the script of the
// search runs in a hidden frame, which takes and sends the messages of a worker.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      const inner = frame.contentWindow;
      inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const script = inner.document.createElement("script");
      script.src = url;
      const loaded = new Promise((resolve) => script.addEventListener("load", resolve));
      inner.document.body.append(script);
      this.postMessage = (data) => {
        loaded.then(() => inner.dispatchEvent(new inner.MessageEvent("message", { data })));
      };
    }
  };
}
