// Keeps JupyterLab's one-letter commands and arrows away from whatever has the focus in the box around it.
export default {
  render({ el }) {
    const own = (event) => event.target.setAttribute("data-lm-suppress-shortcuts", "true");
    const attach = () => {
      const box = el.closest(".setlib-keys");
      if (box) box.addEventListener("focusin", own);
      else setTimeout(attach, 50);
    };
    attach();
  },
};
