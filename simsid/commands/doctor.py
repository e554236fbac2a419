"""`simsid doctor`."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Doctor:
    """List versions, GPU, decoders and kernels, and the one command that fixes each gap."""

    def run(self) -> int:
        """Print the findings; the exit status is 1 when something that simsid needs is missing."""
        from simsid.doctor import examine

        findings = examine()
        width = max(len(finding.subject) for finding in findings)
        for finding in findings:
            print(f"{finding.mark:<5}{finding.subject:<{width}}  {finding.text}")
            if finding.remedy:
                print(f"{'':<5}{'':<{width}}  -> {finding.remedy}")
        return 1 if any(finding.mark == "FAIL" for finding in findings) else 0
