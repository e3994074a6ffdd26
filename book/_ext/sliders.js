// Draws each stored Plotly figure, with range inputs, which the keyboard can move, in place of Plotly's own sliders.
for (const holder of document.querySelectorAll("div.slider-figure")) {
  const figure = JSON.parse(holder.querySelector("script").textContent);
  const { sliders, ...layout } = figure.layout;
  const plot = document.createElement("div");
  plot.className = "slider-plot";
  const controls = document.createElement("div");
  controls.className = "slider-controls";
  holder.append(controls, plot);

  const options = { responsive: true, displayModeBar: false };
  Plotly.newPlot(plot, figure.data, { ...layout, autosize: true, width: undefined }, options);
  for (const slider of sliders) {
    const label = document.createElement("label");
    const value = document.createElement("output");
    const input = document.createElement("input");
    Object.assign(input, { type: "range", min: 0, max: slider.steps.length - 1, step: 1, value: slider.active });
    const show = () => {
      const step = slider.steps[input.value];
      value.textContent = step.label;
      input.setAttribute("aria-valuetext", step.label);
      return Plotly.restyle(plot, step.args[0]);
    };
    input.addEventListener("input", show);
    label.append(`${slider.currentvalue.prefix} `, value, input);
    controls.append(label);
    show();
  }
}
