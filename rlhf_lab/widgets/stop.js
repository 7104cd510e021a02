// A button that ends training. A kernel that is busy with a cell hears nothing from the page, so
// there the server is asked to interrupt it, as the notebook's own stop button does.
async function interrupt(kernel) {
  const page = document.getElementById("jupyter-config-data");
  const config = page ? JSON.parse(page.textContent) : {};
  const cookie = document.cookie.match(/(?:^|; )_xsrf=([^;]*)/);
  const headers = cookie ? { "X-XSRFToken": decodeURIComponent(cookie[1]) } : {};
  if (config.token) headers.Authorization = `token ${config.token}`;
  const url = `${config.baseUrl ?? "/"}api/kernels/${encodeURIComponent(kernel)}/interrupt`;
  const answer = await fetch(url, { method: "POST", headers, credentials: "same-origin" });
  if (!answer.ok) throw new Error(`${answer.status}`);
}

export default {
  render({ model, el }) {
    const button = document.createElement("button");
    button.className = "lab-stop jupyter-button widget-button";
    const show = () => {
      button.textContent = model.get("label");
      button.disabled = model.get("off");
    };
    button.addEventListener("click", async () => {
      button.disabled = true;
      button.textContent = "stopping …";
      model.set("clicks", model.get("clicks") + 1);
      model.save_changes();
      const kernel = model.get("kernel");
      if (!kernel) return;
      try {
        await interrupt(kernel);
      } catch {
        button.textContent = "use the notebook's ■";
      }
    });
    model.on("change:label", show);
    model.on("change:off", show);
    show();
    el.append(button);
  },
};
