// Images of the message that is being written: dropped, pasted, chosen, or named by their address.

import { byId, make } from "./elements.js";

const list = byId("attached");
let attached = [];

/** The images so far, as `{url, name}`; files are `data:` URLs. */
export const images = () => attached;

/** Show `found` in place of the images so far. */
export function setImages(found) {
  attached = found;
  list.replaceChildren(...attached.map((image, index) => make("li", {},
    picture(image, index),
    make("button", {
      type: "button", textContent: "×", "aria-label": `Remove image ${index + 1}`,
      onclick: () => {
        setImages(attached.filter((each) => each !== image));
        (list.querySelector("button") ?? byId("prompt")).focus();
      },
    }),
  )));
}

/** What is shown of an image. One with an address is not loaded: the page asks no other server. */
export function picture(image, index) {
  if (!image.url.startsWith("data:")) return make("span", { class: "address", textContent: image.url });
  return make("img", { src: image.url, alt: `Image ${index + 1}${image.name ? `: ${image.name}` : ""}` });
}

const read = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve({ url: reader.result, name: file.name });
  reader.onerror = () => reject(reader.error);
  reader.readAsDataURL(file);
});

async function add(files) {
  const found = [...files].filter((file) => file.type.startsWith("image/"));
  if (!found.length) return;
  const made = await Promise.all(found.map(read));
  setImages([...attached, ...made]);
  byId("status").textContent = `${attached.length} ${attached.length === 1 ? "image" : "images"} attached`;
  byId("prompt").focus();
}

function addAddress() {
  const field = byId("address");
  if (!field.value || !field.checkValidity()) return field.reportValidity();
  setImages([...attached, { url: field.value }]);
  field.value = "";
  field.closest("details").open = false;
  byId("prompt").focus();
}

/** Listen for images. */
export function listen() {
  byId("files").addEventListener("change", async (event) => {
    await add(event.target.files);
    event.target.value = "";
  });
  document.addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) {
      event.preventDefault();
      add(event.clipboardData.files);
    }
  });
  byId("add-address").addEventListener("click", addAddress);
  byId("address").addEventListener("keydown", (event) => {
    if (event.key === "Enter") {
      event.preventDefault();
      addAddress();
    }
  });
  const holdsFiles = (event) => event.dataTransfer?.types.includes("Files");
  let depth = 0;
  const dragged = (change) => (event) => {
    if (!holdsFiles(event)) return;
    event.preventDefault();
    depth = change === 0 ? 0 : depth + change;
    document.body.classList.toggle("dragging", depth > 0);
  };
  document.addEventListener("dragenter", dragged(1));
  document.addEventListener("dragleave", dragged(-1));
  document.addEventListener("dragover", (event) => holdsFiles(event) && event.preventDefault());
  document.addEventListener("drop", (event) => {
    dragged(0)(event);
    if (holdsFiles(event)) add(event.dataTransfer.files);
  });
}
