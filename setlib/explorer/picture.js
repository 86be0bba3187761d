// A picture that says where it was clicked, in fractions from its upper left corner.
export default {
  render({ model, el }) {
    const image = document.createElement("img");
    image.alt = "what the words above say";
    image.style.maxWidth = "100%";
    const show = () => {
      URL.revokeObjectURL(image.src);
      image.hidden = !model.get("value").byteLength;
      image.src = URL.createObjectURL(new Blob([model.get("value")], { type: "image/jpeg" }));
    };
    model.on("change:value", show);
    show();
    image.addEventListener("click", (event) => {
      const box = image.getBoundingClientRect();
      model.send({ x: (event.clientX - box.left) / box.width, y: (event.clientY - box.top) / box.height });
    });
    el.appendChild(image);
  },
};
