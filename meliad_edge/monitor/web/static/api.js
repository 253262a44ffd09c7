// Questions to the watch. Whoever is not logged in any more is sent to log in.

export class Refusal extends Error {}

export async function ask(path, { method = "GET", body, ...options } = {}) {
  const response = await fetch(`/api/v1${path}`, {
    method,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
    ...options,
  });
  if (response.status === 401) {
    location.replace("/login");
    throw new Refusal("not logged in");
  }
  if (!response.ok) {
    const problem = await response.json().catch(() => ({}));
    throw new Refusal(problem.detail ?? `the watch answers ${response.status}`);
  }
  return response.json();
}
