const form = document.getElementById("login");
const field = document.getElementById("token");
const problem = document.getElementById("problem");

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  problem.textContent = "";
  try {
    const response = await fetch("/login", {
      method: "POST",
      headers: { "Content-Type": "application/json" },
      body: JSON.stringify({ token: field.value.trim() }),
    });
    if (response.ok) {
      location.replace("/");
      return;
    }
    problem.textContent = (await response.json()).detail;
  } catch {
    problem.textContent = "The watch does not answer.";
  }
  field.select();
});

field.focus();
