// A button for a picture file that also takes a dropped one. The file is sent in pieces: servers refuse long messages.
const MOST = 200e6, PIECE = 4e6; // bytes

export default {
  render({ model, el }) {
    const input = document.createElement("input");
    Object.assign(input, { type: "file", accept: "image/*", title: model.get("note") });
    input.setAttribute("aria-label", "picture of yours");
    input.style.width = "100%";
    input.addEventListener("change", async () => {
      const file = input.files[0];
      if (!file) return;
      input.disabled = true;
      try {
        if (file.size > MOST) throw `has ${Math.round(file.size / 1e6)} MB: choose a file of under ${MOST / 1e6} MB`;
        for (let at = 0; at === 0 || at < file.size; at += PIECE) {
          const part = await file.slice(at, at + PIECE).arrayBuffer();
          model.send({ name: file.name, first: at === 0, last: at + PIECE >= file.size }, undefined, [part]);
        }
      } catch (problem) {
        model.send({ name: file.name, refused: typeof problem === "string" ? problem : "cannot be read" });
      }
      input.disabled = false;
      input.value = "";
    });
    el.appendChild(input);
  },
};
