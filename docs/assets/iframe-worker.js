// Search on pages that are opened from a disk (file://), where browsers start no Worker: the theme's search script runs
// in a hidden frame of the page instead. Without this file the theme would fetch its own replacement from the network.
if (location.protocol === "file:") {
  class FrameWorker extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      this.ready = new Promise(resolve => frame.addEventListener("load", () => resolve(frame.contentWindow)))
      this.ready.then(inside => {
        // What the script calls to answer; in a frame it would post to the frame itself.
        inside.postMessage = data => {
          const answer = new MessageEvent("message", { data })
          this.dispatchEvent(answer)
          if (typeof this.onmessage === "function") this.onmessage(answer)
        }
      })
      frame.hidden = true
      frame.srcdoc = `<script src="${new URL(url, location.href)}"></` + "script>"
      document.body.append(frame)
    }
    // Messages wait until the script is there, and stay in order.
    postMessage(data) {
      this.ready.then(inside => inside.dispatchEvent(new inside.MessageEvent("message", { data })))
    }
    terminate() {}
  }
  window.IFrameWorker = window.Worker = FrameWorker
}
