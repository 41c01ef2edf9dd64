"""`fieldvit fleet …`: sites, tokens, certificates."""

import json
import os
import threading
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Annotated

import typer

fleet_app = typer.Typer(
    help="Make a site with its own authority and broker rules, let boards in, shut them out.", no_args_is_help=True
)

SiteArgument = Annotated[str, typer.Argument(help="The site's name, as in its topics.", show_default=False)]
SitesOption = Annotated[Path, typer.Option("--sites", "--out", help="Where sites are kept, one directory each.")]
SITES = Path("sites")
RELOAD = "reload the broker, so that it takes them: systemctl reload mosquitto, or kill -HUP its process"


@fleet_app.command("init", epilog="Example: fieldvit fleet init greenhouse --broker broker.local --out sites")
def init(
    site: SiteArgument,
    broker: Annotated[str, typer.Option(help="The broker's host name or address, as boards reach it.")] = "localhost",
    broker_port: Annotated[int, typer.Option(min=1, max=65535, help="Its TLS port.")] = 8883,
    enrol: Annotated[str, typer.Option(help="Host name of the enrolment service; without it, the broker's.")] = "",
    enrol_port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 8443,
    days: Annotated[float, typer.Option(help="Life of a board's certificate; it is renewed from half of it on.")] = 365,
    broker_files: Annotated[
        str, typer.Option(help="Where the directory broker/ will lie on the broker's machine, if it is another one.")
    ] = "",
    sites: SitesOption = SITES,
) -> None:
    """Make a site: authority, broker certificate, mosquitto configuration with access rules, monitor and operator."""
    from host.fleet.site import SiteSettings, create_site, site_directory

    settings = SiteSettings(
        site=site,
        broker_hostname=broker,
        broker_port=broker_port,
        enrol_hostname=enrol,
        enrol_port=enrol_port,
        device_days=days,
        broker_files=broker_files,
    )
    directory = site_directory(sites, site)
    create_site(directory, settings)
    print(f"{directory}: made; ca.key is the site's authority, back it up and show it to nobody")
    if os.geteuid() == 0 and not broker_files:
        give = f"chown -R mosquitto {directory / 'broker'} && chmod 711 {directory}"
        print(f"broker: root's mosquitto runs as the user mosquitto: {give}")
    if broker_files:
        print(f"broker: what is in {directory / 'broker'} belongs into {broker_files} on its machine")
    print(f"broker: start it with mosquitto -c {PurePath(broker_files or directory / 'broker') / 'mosquitto.conf'}")
    where = "" if sites == SITES else f" --sites {sites}"
    print(
        f"boards: run 'fieldvit fleet enrol {site}{where}', and 'fieldvit fleet token {site} DEVICE{where}' for each;"
    )
    print("        with that token, on the board:")
    print(f"        fieldvit-device setup --site {site} --device DEVICE --board BOARD --token -")


@fleet_app.command("token", epilog="Example: fieldvit fleet token greenhouse cam-1 --hours 24")
def token(
    site: SiteArgument,
    device: Annotated[str, typer.Argument(help="The board's id.", show_default=False)],
    hours: Annotated[float, typer.Option(help="How long it may be used.")] = 72,
    sites: SitesOption = SITES,
) -> None:
    """Print a one-time token that lets one board get its certificate; an earlier one of that board is void."""
    from host.fleet.site import Site, site_directory

    print(Site(site_directory(sites, site)).make_token(device, hours=hours))


@fleet_app.command("enrol", epilog="Example: fieldvit fleet enrol greenhouse --host 0.0.0.0")
def enrol(
    site: SiteArgument,
    host: Annotated[str, typer.Option(help="Address to listen on; empty: all.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; without it, the site's.")] = 0,
    sites: SitesOption = SITES,
) -> None:
    """Serve enrolment and renewal of certificates over HTTPS, until Ctrl-C."""
    import logging

    from host.fleet.enrolment import serve_enrolment
    from host.fleet.site import Site, site_directory

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    opened = Site(site_directory(sites, site))
    with serve_enrolment(opened, host, port or opened.settings.enrol_port) as bound:
        print(f"enrolment service of {site}: port {bound}, boards use {opened.settings.enrol_url}", flush=True)
        threading.Event().wait()


@fleet_app.command("revoke", epilog="Example: fieldvit fleet revoke greenhouse cam-1")
def revoke(
    site: SiteArgument,
    device: Annotated[str, typer.Argument(help="The board's id; or monitor, operator.", show_default=False)],
    sites: SitesOption = SITES,
) -> None:
    """Shut a board out: its certificates and unused tokens are void."""
    from host.fleet.site import Site, site_directory

    opened = Site(site_directory(sites, site))
    count = opened.revoke(device)
    print(f"{site}/{device}: {count} certificates revoked; crl.pem and acl in {opened.directory / 'broker'} are new")
    print("the broker has taken them" if opened.reload_broker() else RELOAD)


@fleet_app.command("renew-broker", epilog="Example: fieldvit fleet renew-broker greenhouse")
def renew_broker(site: SiteArgument, sites: SitesOption = SITES) -> None:
    """Give a site's broker a new certificate, for the key it has."""
    from host.fleet.site import Site, site_directory

    opened = Site(site_directory(sites, site))
    issued = opened.renew_broker()
    print(
        f"{site}: the broker's certificate is good until {issued.expires:%Y-%m-%d}: {opened.directory}/broker/broker.pem"
    )
    print("the broker has taken it" if opened.reload_broker() else RELOAD.replace("them", "it"))
    print("the enrolment service takes it at its next start: fieldvit fleet enrol " + site)


@fleet_app.command("list", epilog="Example: fieldvit fleet list greenhouse --json")
def list_certificates(
    site: SiteArgument,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object to standard output.")] = False,
    sites: SitesOption = SITES,
) -> None:
    """List the certificates of a site: the broker's, and those of who may connect, newest first."""
    from host.fleet.site import Site, site_directory

    opened = Site(site_directory(sites, site))
    rows, broker = opened.certificates(), opened.broker_certificate
    if as_json:
        table = {"serial": broker.serial, "starts": broker.starts.timestamp(), "expires": broker.expires.timestamp()}
        print(json.dumps({"certificates": rows, "broker": table}, indent=1))
        return
    print(f"{'the broker':20s} {f'until {broker.expires:%Y-%m-%d}':20s} serial {broker.serial}")
    for row in rows:
        state = f"revoked {_day(row['revoked'])}" if row["revoked"] else f"until {_day(row['expires'])}"
        print(f"{row['name']:20s} {state:20s} serial {row['serial']}")


def _day(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d}"
