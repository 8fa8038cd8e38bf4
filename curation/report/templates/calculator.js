"use strict";
const form = document.getElementById("calculator");
const sum = document.getElementById("sum");
const say = (value, unit) => Intl.NumberFormat("en", { maximumSignificantDigits: 4 }).format(value) + " " + unit;
const duration = (hours) => (hours >= 48 ? say(hours / 24, "days") : hours >= 1.5 ? say(hours, "h") : say(hours * 60, "min"));
function recount() {
  const field = (name) => Number(form.elements[name].value);
  const [samples, rate, devices, price, watts] = ["samples", "rate", "devices", "price", "watts"].map(field);
  const good = samples > 0 && rate > 0 && devices > 0 && price >= 0 && watts >= 0;
  const deviceHours = samples / rate / 3600;
  const values = [duration(deviceHours / devices), say(deviceHours, "h"), say(deviceHours * price, form.dataset.currency), say((deviceHours * watts) / 1000, "kWh")];
  sum.querySelectorAll("dd").forEach((cell, place) => { cell.textContent = good ? values[place] : "–"; });
}
form.addEventListener("input", recount);
form.addEventListener("submit", (event) => event.preventDefault());
recount();
