/** Keeps the end in view while an answer grows, and yields as soon as the reader looks back. */

const NEAR = 4; // pixels from the end that count as the end

export class Follow {
  /** @param {HTMLElement} scroller @param {HTMLElement} button shown while the end is out of view */
  constructor(scroller, button) {
    Object.assign(this, { scroller, button, following: true, top: 0 });
    scroller.addEventListener("scroll", () => this.#scrolled(), { passive: true });
    scroller.addEventListener("wheel", (event) => { if (event.deltaY < 0) this.#yield(); }, { passive: true });
    scroller.addEventListener("keydown", ({ key }) => { if (["PageUp", "ArrowUp", "Home"].includes(key)) this.#yield(); });
    button.addEventListener("click", () => this.toEnd());
  }

  /** Call after the content grew. */
  grown() {
    if (this.following) this.scroller.scrollTop = this.scroller.scrollHeight;
    this.#showButton();
  }

  toEnd() {
    this.following = true;
    this.grown();
  }

  #yield() {
    if (this.scroller.scrollHeight > this.scroller.clientHeight) this.following = false;
  }

  #distance() {
    return this.scroller.scrollHeight - this.scroller.scrollTop - this.scroller.clientHeight;
  }

  #scrolled() {
    const { scrollTop } = this.scroller;
    if (this.#distance() <= NEAR) this.following ||= scrollTop > this.top; // not on the way up
    else if (scrollTop < this.top) this.following = false;
    this.top = scrollTop;
    this.#showButton();
  }

  #showButton() {
    this.button.hidden = this.following || this.#distance() <= NEAR;
  }
}
