"""All commands."""

COMMANDS = {
    "serve": "cluster.serve:serve",
    "status": "commands.instances:status",
    "top": "commands.top:top",
    "requests": "commands.requests:requests",
    "migrate": "commands.requests:migrate",
    "migrations": "commands.requests:migrations",
    "add": "commands.instances:add",
    "drain": "commands.instances:drain",
    "remove": "commands.instances:remove",
    "undrain": "commands.instances:undrain",
    "restart": "commands.restarting:restart",
    "config": "commands.configuring:config",
    "reload": "commands.configuring:reload",
    "doctor": "commands.doctor:doctor",
    "version": "commands.doctor:version",
    "completion": "commands.completing:completion",
    "simulate": "sim.command:simulate",
    "profile": "sim.profiling:profile",
    "replay": "commands.replaying:replay",
    "ui": "commands.page:ui",
}
"""The function of each: it takes the words that follow, and returns the exit status. Its module is
imported when it is called, because some take seconds."""
