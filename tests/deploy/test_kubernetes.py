"""deploy/kubernetes: against the schemas of Kubernetes, and each part against the others."""

from __future__ import annotations

import re
from typing import Any

import kubernetes_validate
import yaml

from gateway.settings import Settings
from tests.deploy.case import DEPLOY, FILES, FOLDER, DeployTestCase, port_of

#: the oldest that has preStop.sleep, and what the schemas have at the most
VERSIONS = ("1.30", kubernetes_validate.latest_version())
MANIFEST = DEPLOY / "kubernetes/wsgateway.yaml"
PARTS: dict[str, dict[str, Any]] = {
    f"{part['kind']} {part['metadata']['name']}": part for part in yaml.safe_load_all(MANIFEST.read_text())
}
DEPLOYMENT = PARTS["Deployment wsgateway"]["spec"]
POD = DEPLOYMENT["template"]["spec"]
LABELS = DEPLOYMENT["template"]["metadata"]["labels"]
(NODE,) = POD["containers"]
PORTS = {port["name"]: port["containerPort"] for port in NODE["ports"]}


class Manifest(DeployTestCase):
    def node(self) -> Settings:
        """The settings of a node in a pod."""
        values = {env["name"]: f"value-of-{env['name'].lower().replace('_', '-')}" for env in NODE["env"]}
        arguments = [re.sub(r"\$\(([A-Z_]+)\)", lambda found: values[found[1]], argument) for argument in NODE["args"]]
        made = self.settings(arguments)
        self.assertEqual(made.node_name, "value-of-pod-name")
        self.assertEqual(made.peer_url, f"ws://value-of-pod-ip:{PORTS['backend']}")
        return made

    def test_manifests_are_valid(self) -> None:
        self.assertEqual(len(PARTS), 6)
        for part in PARTS.values():
            for version in VERSIONS:
                kubernetes_validate.validate(part, version, strict=True)

    def test_one_namespace(self) -> None:
        self.assertEqual({part["metadata"]["namespace"] for part in PARTS.values()}, {"wsgateway"})

    def test_ports_agree(self) -> None:
        made = self.node()
        self.assertEqual([port_of(endpoint) for endpoint in made.listen], [PORTS["clients"]])
        self.assertEqual([port_of(endpoint) for endpoint in made.backend], [PORTS["backend"]])
        for probe, path in [("readinessProbe", "/readyz"), ("livenessProbe", "/healthz")]:
            self.assertEqual(NODE[probe]["httpGet"], {"path": path, "port": "backend"})
        services = {name: part["spec"] for name, part in PARTS.items() if part["kind"] == "Service"}
        targets = {name: [port["targetPort"] for port in spec["ports"]] for name, spec in services.items()}
        self.assertEqual(targets, {"Service wsgateway": ["clients"], "Service wsgateway-nodes": ["backend"]})
        allowed = PARTS["NetworkPolicy wsgateway"]["spec"]["ingress"]
        self.assertEqual([rule["ports"][0]["port"] for rule in allowed], [PORTS["clients"], PORTS["backend"]])
        self.assertIn({"podSelector": {"matchLabels": LABELS}}, allowed[1]["from"])
        self.assertNotIn("ipBlock", str(allowed[1]))

    def test_selectors_find_the_pods(self) -> None:
        selectors = [
            DEPLOYMENT["selector"]["matchLabels"],
            PARTS["Service wsgateway"]["spec"]["selector"],
            PARTS["Service wsgateway-nodes"]["spec"]["selector"],
            PARTS["PodDisruptionBudget wsgateway"]["spec"]["selector"]["matchLabels"],
            PARTS["NetworkPolicy wsgateway"]["spec"]["podSelector"]["matchLabels"],
            *(spread["labelSelector"]["matchLabels"] for spread in POD["topologySpreadConstraints"]),
        ]
        self.assertEqual(selectors, [LABELS] * 7)

    def test_termination_grace_period(self) -> None:
        made = self.node()
        # Longer than two failed probes, and the notice to load balancers.
        self.assertGreaterEqual(made.drain_delay, 10)
        self.assertNotIn("lifecycle", NODE)
        grace = POD["terminationGracePeriodSeconds"]
        self.assert_stop_timeout(grace, made)
        # One drain after the other in a roll-out.
        self.assertGreater(DEPLOYMENT["minReadySeconds"], made.drain_delay + made.drain_seconds)
        (attributes,) = (
            dict(pair.split("=") for pair in value.split(","))
            for name, value in PARTS["Service wsgateway"]["metadata"]["annotations"].items()
            if name.endswith("target-group-attributes")
        )
        self.assertGreaterEqual(int(attributes["deregistration_delay.timeout_seconds"]), grace)
        self.assertEqual(attributes["proxy_protocol_v2.enabled"], "true")
        self.assertTrue(made.listen[0].startswith("haproxy:"))

    def test_files_match_the_secret(self) -> None:
        (secrets,) = (volume["secret"] for volume in POD["volumes"] if "secret" in volume)
        items = {item["path"]: item["key"] for item in secrets["items"]}
        read = set(re.findall(rf"{FOLDER}/([a-z-]+)", " ".join(NODE["args"])))
        made_by = " ".join(MANIFEST.read_text().partition("apiVersion")[0].split())
        self.assertEqual(read, set(items))
        self.assertEqual(read, set(FILES))
        self.assertEqual(set(items.values()), set(re.findall(r"--from-file=([a-z-]+)", made_by)))
        self.assertIn(f"kubectl create secret generic {secrets['secretName']} --namespace wsgateway", made_by)
        mounted = {mount["name"]: mount["mountPath"] for mount in NODE["volumeMounts"]}
        self.assertEqual(mounted["secrets"], FOLDER)
        self.assertEqual(set(mounted), {volume["name"] for volume in POD["volumes"]})

    def test_user_matches_the_image(self) -> None:
        dockerfile = (DEPLOY / "docker/Dockerfile").read_text()
        user = POD["securityContext"]["runAsUser"]
        self.assertIn(f"\nUSER {user}\n", dockerfile)
        self.assertIn(f"\nWORKDIR {NODE['volumeMounts'][1]['mountPath']}\n", dockerfile)
        # Files of a Secret are root's: by the group they can be read.
        self.assertEqual(POD["securityContext"]["fsGroup"], POD["securityContext"]["runAsGroup"])
        (secrets,) = (volume["secret"] for volume in POD["volumes"] if "secret" in volume)
        self.assertEqual(secrets["defaultMode"], 0o440)

    def test_autoscaling_target_is_below_capacity(self) -> None:
        made = self.node()
        scaler = PARTS["HorizontalPodAutoscaler wsgateway"]["spec"]
        self.assertEqual(scaler["scaleTargetRef"]["name"], PARTS["Deployment wsgateway"]["metadata"]["name"])
        (metric,) = scaler["metrics"]
        self.assertIn(f"``{metric['pods']['metric']['name']}``", (DEPLOY.parent / "docs/operating.rst").read_text())
        target, least = int(metric["pods"]["target"]["averageValue"]), scaler["minReplicas"]
        # With one node fewer than the least there is room for all.
        self.assertLessEqual(target * least, made.capacity * (least - 1) * 1.05)
