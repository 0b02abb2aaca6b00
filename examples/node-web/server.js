// A web server with one npm dependency.
const http = require("http");
const ms = require("ms");

const started = Date.now();
http
  .createServer((request, response) => {
    response.end(`Hello from ${process.env.DYNO}, up ${ms(Date.now() - started)}.\n`);
  })
  .listen(process.env.PORT, () => console.log(`listening on ${process.env.PORT}`));
