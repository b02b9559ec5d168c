"""deploy/aws: by cfn-lint, and what an instance of it would start, by the node itself."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

from cfnlint.api import lint_file
from cfnlint.decode import cfn_yaml

from gateway.cloud import autoscaling
from gateway.settings import Settings
from tests.deploy.case import DEPLOY, FILES, DeployTestCase, port_of
from tests.deploy.test_systemd import arguments, unit

TEMPLATE = DEPLOY / "aws/wsgateway.yaml"
#: what a stack could be made with; the others have defaults
GIVEN = {
    "AWS::StackName": "gw-1",
    "AWS::Region": "eu-central-1",
    "Zone": "Z0123456789ABC",
    "PublicName": "gateway.example.com",
    "Registry": "mysql://wsgateway@db.example.com:3306/wsgateway",
    "Bucket": "artifacts",
    "AWS::Partition": "aws",
    "AWS::AccountId": "123456789012",
}


@cache
def template() -> dict[str, Any]:
    read: dict[str, Any] = cfn_yaml.load(str(TEMPLATE))
    return read


def properties(name: str) -> dict[str, Any]:
    found: dict[str, Any] = template()["Resources"][name]["Properties"]
    return found


def substituted(text: str) -> str:
    """What CloudFormation makes of the text of a ``!Sub``."""

    def value(found: re.Match[str]) -> str:
        name = found[1]
        return str(GIVEN[name] if name in GIVEN else template()["Parameters"][name]["Default"])

    return re.sub(r"\$\{([A-Za-z:]+)\}", value, text)


def user_data() -> str:
    return substituted(properties("LaunchTemplate")["LaunchTemplateData"]["UserData"]["Fn::Base64"]["Fn::Sub"])


def tap_cfg() -> str:
    """What the script writes, with one variable of its own."""
    (config,) = re.findall(r"<<END\n(.*?)\nEND\n", user_data(), flags=re.DOTALL)
    return str(config)


def attributes(name: str) -> dict[str, str]:
    return {one["Key"]: one["Value"] for one in properties(name)["TargetGroupAttributes"]}


class AwsTestCase(DeployTestCase):
    def node(self) -> Settings:
        """The settings of the node on an instance."""
        (limit,) = unit()["LimitNOFILE"]
        (instance,) = re.findall(r"^systemctl enable --now wsgateway@(\d+)$", user_data(), flags=re.MULTILINE)
        (environment,) = re.findall(r'^echo "(.*)" > /etc/wsgateway/environment$', user_data(), flags=re.MULTILINE)
        made = self.settings(
            arguments(instance, environment.replace("$address", "10.0.0.5"))[3:],
            config=tap_cfg().replace("$address", "10.0.0.5"),
            open_files=int(limit),
        )
        self.assertNotIn("$", str(made))
        return made

    def statements(self) -> dict[str, dict[str, Any]]:
        """What the role of an instance allows, by name."""
        (policy,) = properties("NodeRole")["Policies"]
        return {statement["Sid"]: statement for statement in policy["PolicyDocument"]["Statement"]}


class Template(DeployTestCase):
    def test_cloudformation_accepts_the_template(self) -> None:
        self.assertEqual([str(problem) for problem in lint_file(TEMPLATE)], [])


class Instance(AwsTestCase):
    def test_node_accepts_the_options(self) -> None:
        made = self.node()
        (seconds,) = unit()["TimeoutStopSec"]
        self.assert_stop_timeout(int(seconds), made)
        self.assertEqual(made.public_url, "wss://gateway.example.com")

    def test_script_is_valid(self) -> None:
        said = subprocess.run(["bash", "-n"], input=user_data(), capture_output=True, text=True, check=False)
        self.assertEqual((said.returncode, said.stderr), (0, ""))
        # Base64 of 16 KiB is the most that there can be.
        self.assertLess(len(user_data()), 12000)

    def test_installed_files_exist(self) -> None:
        installed = re.findall(r"^install -m 644 (\S+) (\S+)$", user_data(), flags=re.MULTILINE)
        self.assertEqual(len(installed), 3)
        for source, target in installed:
            self.assertTrue((DEPLOY / source).exists(), source)
            # As the files themselves say.
            where = f"{target}{Path(source).name}" if target.endswith("/") else target
            self.assertIn(where, (DEPLOY / source).read_text())

    def test_files_of_the_node_are_installed(self) -> None:
        (names,) = re.findall(r"^for name in (.*); do$", user_data(), flags=re.MULTILINE)
        self.assertEqual({*names.split(), "clients"}, set(FILES))
        self.assertIn("/clients /etc/wsgateway/clients\n", user_data())

    def test_node_port_matches_the_template(self) -> None:
        made = self.node()
        clients, backends = port_of(made.listen[0]), port_of(made.backend[0])
        self.assertEqual(made.peer_url, f"ws://10.0.0.5:{backends}")
        self.assertEqual(properties("Targets")["HealthCheckPort"], str(backends))
        self.assertEqual(properties("Targets")["Port"], clients)
        ingress = [*properties("NodeSecurityGroup")["SecurityGroupIngress"], properties("NodesToNodes")]
        allowed = [(rule["FromPort"], rule["ToPort"]) for rule in ingress]
        self.assertEqual(allowed, [(port, port) for port in (clients, backends, backends, backends)])
        self.assertTrue(all("SourceSecurityGroupId" in rule for rule in ingress))

    def test_imdsv2_with_hop_limit_1(self) -> None:
        options = properties("LaunchTemplate")["LaunchTemplateData"]["MetadataOptions"]
        self.assertEqual((options["HttpTokens"], options["HttpPutResponseHopLimit"]), ("required", 1))


class Rights(AwsTestCase):
    def test_permissions_are_minimal(self) -> None:
        actions = {name: statement["Action"] for name, statement in self.statements().items()}
        self.assertEqual(
            actions,
            {
                "Metrics": "cloudwatch:PutMetricData",
                "FindHook": "autoscaling:DescribeLifecycleHooks",
                "Lifecycle": [
                    "autoscaling:RecordLifecycleActionHeartbeat",
                    "autoscaling:CompleteLifecycleAction",
                ],
                "ChangeRecords": "route53:ChangeResourceRecordSets",
                "ListRecords": "route53:ListResourceRecordSets",
                "Install": "s3:GetObject",
                "Secrets": "ssm:GetParameter",
            },
        )
        anywhere = {name for name, statement in self.statements().items() if statement["Resource"] == "*"}
        self.assertEqual(anywhere, {"Metrics", "FindHook"})

    def test_permissions_match_the_options(self) -> None:
        config = tap_cfg()
        lifecycle = substituted(self.statements()["Lifecycle"]["Resource"]["Fn::Sub"])
        (group,) = re.findall(r"^autoscaling = aws:group=([^:]+):region=eu-central-1:hook=drain$", config, re.MULTILINE)
        self.assertTrue(lifecycle.endswith(f":autoScalingGroupName/{group}"))
        (name,) = re.findall(r"^dns = route53:zone=Z0123456789ABC:name=([^:]+):address=", config, re.MULTILINE)
        condition = self.statements()["ChangeRecords"]["Condition"]["ForAllValues:StringEquals"]
        (allowed,) = condition["route53:ChangeResourceRecordSetsNormalizedRecordNames"]
        self.assertEqual(substituted(allowed["Fn::Sub"]), name)
        self.assertEqual(condition["route53:ChangeResourceRecordSetsRecordTypes"], ["A", "AAAA"])


class Group(AwsTestCase):
    def test_policy_matches_the_published_metrics(self) -> None:
        metric = properties("ScalingPolicy")["TargetTrackingConfiguration"]["CustomizedMetricSpecification"]
        namespace = self.statements()["Metrics"]["Condition"]["StringEquals"]["cloudwatch:namespace"]
        self.assertEqual((metric["Namespace"], metric["Statistic"]), (namespace, "Average"))
        self.assertEqual(metric["Dimensions"], [{"Name": "AutoScalingGroupName", "Value": {"Ref": "Group"}}])
        self.assertIn(f"{metric['MetricName']}  37.5 {metric['Unit']} ", autoscaling.__doc__ or "")
        self.assertEqual(properties("Group")["AutoScalingGroupName"], {"Ref": "AWS::StackName"})

    def test_instances_wait_for_their_nodes(self) -> None:
        hook = properties("DrainHook")
        self.assertEqual(hook["LifecycleTransition"], "autoscaling:EC2_INSTANCE_TERMINATING")
        self.assertEqual((hook["LifecycleHookName"], hook["DefaultResult"]), ("drain", "CONTINUE"))
        # A database that is away must not end the fleet.
        self.assertEqual(properties("Group")["HealthCheckType"], "EC2")

    def test_load_balancer_closes_no_connection(self) -> None:
        given = attributes("Targets")
        for name in ("target_health_state.unhealthy", "deregistration_delay"):
            self.assertEqual(given[f"{name}.connection_termination.enabled"], "false")
        made = self.node()
        self.assert_stop_timeout(int(given["deregistration_delay.timeout_seconds"]), made)
        targets = properties("Targets")
        checks = targets["HealthCheckIntervalSeconds"] * targets["UnhealthyThresholdCount"]
        self.assertGreater(made.drain_delay, checks + targets["HealthCheckTimeoutSeconds"])
        self.assertGreater(350, made.ping_interval + made.ping_timeout)
        self.assertTrue(made.listen[0].startswith("haproxy:"))
        self.assertEqual(given["proxy_protocol_v2.enabled"], "true")
        self.assertEqual(properties("Targets")["HealthCheckPath"], "/readyz")
